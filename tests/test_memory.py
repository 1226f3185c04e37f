"""The estimate of memory against closed forms and against what torch's profiler sees a real step allocate."""

import json
from itertools import accumulate

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from posttrain import memory
from posttrain.errors import UserError

ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
SMALL = {"vocab_size": 512, **ENDS}
LLAMA = LlamaConfig(
    hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, tie_word_embeddings=True, **SMALL,
)  # fmt: skip
QWEN = Qwen3Config(
    hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, max_position_embeddings=256, tie_word_embeddings=False, **SMALL,
)  # fmt: skip
GPT2 = GPT2Config(n_embd=128, n_layer=3, n_head=4, n_positions=256, resid_pdrop=0.1, **SMALL)
GPT2_124M = GPT2Config()


def profiled(work, tmp_path) -> int:
    """Bytes that torch's profiler sees `work()` hold at its peak, beyond what was there before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        kept = work()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    del kept
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    sizes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return max(accumulate(size for _, size in sizes))


def micro_step(model, micro_batch: int, length: int, bf16: bool) -> None:
    ids = torch.randint(model.config.vocab_size, (micro_batch, length))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = memory.next_token_loss(model, ids)
    loss.backward()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("config", [LLAMA, QWEN, GPT2], ids=["llama", "qwen3", "gpt2"])
def test_passing_memory_is_what_a_real_step_allocates(config, bf16, checkpointing, tmp_path):
    model = AutoModelForCausalLM.from_config(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    real = profiled(lambda: micro_step(model, 4, 128, bf16), tmp_path)
    need = memory.estimate(config, 4, 128, bf16=bf16, checkpointing=checkpointing)
    assert need.copies + need.activations + need.logits == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_peak_is_that_of_whole_steps(bf16, tmp_path):
    """From no model at all to the second of two steps of two micro-batches, AdamW and clipping included."""
    config = GPT2Config(n_embd=128, n_layer=2, n_head=4, n_positions=256, resid_pdrop=0, vocab_size=8000, **ENDS)

    def train():
        model = AutoModelForCausalLM.from_config(config).train()
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):
            for _ in range(2):
                micro_step(model, 2, 256, bf16)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer

    assert memory.estimate(config, 2, 256, bf16=bf16).peak == pytest.approx(profiled(train, tmp_path), rel=0.05)


def test_gpt2_by_closed_form():
    count = 124_439_808  # weights of the published checkpoint, head tied
    need = memory.estimate(GPT2_124M, 8, 256, bf16=True)
    assert need.weights == need.gradients == 4 * count
    assert need.optimizer == 8 * count
    matrices = 12 * 12 * 768**2  # query, key, value, output: 4 d^2; MLP: 8 d^2
    muon = memory.estimate(GPT2_124M, 1, 64, optim="muon")
    assert muon.optimizer == 8 * count - 4 * matrices
    # Every matrix that multiplies has a bf16 copy, the tied head, too; 50257 logits a token.
    assert need.copies == pytest.approx(2 * (matrices + 50257 * 768), rel=0.01)


def test_the_peak_is_all_that_is_held_at_once():
    need = memory.Memory(100, 10, 20, 3, copies=5, activations=6, logits=7, update=50)
    assert need.peak == 183
    assert memory.Memory(100, 10, 20, 3, copies=5, activations=60, logits=7, update=50).peak == 205


def test_shards_divide_what_is_kept():
    whole = memory.estimate(LLAMA, 2, 64)
    for spread in ("fsdp2", "zero3"):
        parts = memory.estimate(LLAMA, 2, 64, world=4, spread=spread)
        for name in ("weights", "gradients", "optimizer"):
            assert parts.parts()[name] == whole.parts()[name] / 4
        assert parts.exchange > 0
    assert whole.exchange == 0
    assert memory.estimate(LLAMA, 2, 64, world=4).exchange == whole.gradients


def test_activations_grow_with_tokens_and_layers_and_shrink_when_computed_again():
    one, two = (memory.estimate(GPT2Config(n_layer=4), n, 256, bf16=True) for n in (4, 8))
    assert two.logits == 2 * one.logits
    assert two.activations == pytest.approx(2 * one.activations, rel=0.05)
    deep = memory.estimate(GPT2Config(n_layer=8), 4, 256, bf16=True)
    assert 1.8 * one.activations < deep.activations < 2.2 * one.activations
    again = memory.estimate(GPT2Config(n_layer=8), 4, 256, bf16=True, checkpointing=True)
    assert again.activations < deep.activations / 3
    assert again.weights == deep.weights


def test_a_fused_loss_leaves_out_the_logits():
    whole = memory.estimate(GPT2_124M, 4, 256, bf16=True)
    fused = memory.estimate(GPT2_124M, 4, 256, bf16=True, fused_loss=True)
    # 1024 tokens: pieces of 2 x 1024 x 768 logits and a gradient of 1024 x 768 in bf16, the head's in fp32.
    assert fused.logits == 2 * 3 * 1024 * 768 + 4 * 50257 * 768
    assert fused.logits < whole.logits / 2
    assert fused.activations == pytest.approx(whole.activations, rel=0.02)


def test_fits_leaves_a_margin():
    need = memory.estimate(LLAMA, 2, 64)
    assert memory.fits(LLAMA, 2, 64, device_bytes=2 * need.peak) == (True, need)
    assert not memory.fits(LLAMA, 2, 64, device_bytes=need.peak)[0]


def test_nothing_is_drawn_or_allocated():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    big = LlamaConfig(num_hidden_layers=4, hidden_size=8192, intermediate_size=28672, num_attention_heads=64)
    assert memory.estimate(big, 1, 128).weights > 4 * 4 * 8192 * 28672 * 3
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_refused():
    with pytest.raises(UserError, match="256 positions"):
        memory.estimate(LLAMA, 1, 257)
    with pytest.raises(UserError, match="'sgd', expected one of adamw, muon"):
        memory.estimate(LLAMA, 1, 64, optim="sgd")
    with pytest.raises(UserError, match="spread"):
        memory.estimate(LLAMA, 1, 64, spread="fsdp")


def test_code_that_reads_values_is_refused_by_name():
    class Curious(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).sum() * (2 if x.sum() > 0 else 1)

    with pytest.raises(UserError, match="memory of Curious: its code cannot run without data"):
        memory.footprint(lambda: Curious(4, 4), lambda model: model(torch.ones(2, 4)), 10)


def test_device_memory(tmp_path):
    free = memory.device_memory("cpu")
    assert 0 < free < 1 << 50
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert min(memory._group_room(tmp_path)) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._group_room(tmp_path) == [1 << 62]
    with pytest.raises(UserError, match="meta"):
        memory.device_memory("meta")
