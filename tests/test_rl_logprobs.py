"""Log-probabilities and values from packed rows, against transformers' forward of each sequence by itself."""

import pytest
import torch
from rl_helpers import plain_logps, tiny_llama
from torch.distributions import Categorical

from posttrain.packing import best_fit, by_tokens, pack
from posttrain.rl.logprobs import gather_logps
from posttrain.rl.rollout import model_logps


def sequences(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 250, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = sequences([1, 7, 3, 40, 2, 11, 5])
COMPLETIONS = sequences([1, 30, 2, 9, 64, 1, 5], seed=1)


def other_models():
    """Configs whose forward has traits of its own: grouped heads with QK norm, soft caps with sliding windows."""
    from transformers import AutoModelForCausalLM, Gemma2Config, Qwen3Config

    size = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    torch.manual_seed(0)
    yield AutoModelForCausalLM.from_config(Qwen3Config(**size, **heads)).eval()
    gemma = Gemma2Config(**size, **heads, sliding_window=8, final_logit_softcapping=3.0)
    yield AutoModelForCausalLM.from_config(gemma, attn_implementation="eager").eval()


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("max_tokens", [1, 60, 8192])
def test_packed_logps_equal_the_plain_forward(temperature, max_tokens):
    """Whatever a micro-batch holds beside a sequence: alone (1), a few to a row (60), all together."""
    model = tiny_llama()
    found = model_logps(model, PROMPTS, COMPLETIONS, temperature, max_tokens)
    for prompt, completion, logps in zip(PROMPTS, COMPLETIONS, found, strict=True):
        torch.testing.assert_close(logps, plain_logps(model, prompt, completion, temperature), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("index", [0, 1], ids=["qwen3", "gemma2"])
def test_packed_logps_of_other_architectures(index):
    model = list(other_models())[index]
    found = model_logps(model, PROMPTS, COMPLETIONS, 0.9)
    for prompt, completion, logps in zip(PROMPTS, COMPLETIONS, found, strict=True):
        torch.testing.assert_close(logps, plain_logps(model, prompt, completion, 0.9), atol=1e-5, rtol=1e-5)


def test_padding_on_the_left_gives_the_same_logps_as_packing():
    model = tiny_llama()
    [found] = model_logps(model, [PROMPTS[3]], [COMPLETIONS[3]], 1.0)
    ids = PROMPTS[3] + COMPLETIONS[3]
    for pads in (0, 1, 7):
        mask = torch.tensor([[0] * pads + [1] * len(ids)])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            output = model(torch.tensor([[1] * pads + ids]), attention_mask=mask, position_ids=positions)
        logps = torch.log_softmax(output.logits[0, pads:], -1)
        chosen = logps[len(PROMPTS[3]) - 1 : -1].gather(1, torch.tensor(COMPLETIONS[3])[:, None])[:, 0]
        torch.testing.assert_close(found, chosen, atol=1e-5, rtol=1e-5)


def test_a_document_does_not_see_its_neighbour():
    """Changing the first document of a row leaves the second one's hidden states bit-equal, and the other way."""
    model = tiny_llama()
    first, second, other = sequences([20, 15, 20], seed=4)

    def hidden(left, right):
        packed = pack([left, right], capacity=35)
        assert packed.input_ids.shape == (1, 35) and packed.starts == [0, 20]
        with torch.no_grad():
            return model.model(packed.input_ids, position_ids=packed.position_ids, use_cache=False)[0][0]

    assert torch.equal(hidden(first, second)[20:], hidden(other, second)[20:])
    assert torch.equal(hidden(first, second)[:20], hidden(first, other[:15])[:20])
    assert not torch.equal(hidden(first, second)[:20], hidden(other, second)[:20])


def test_logps_and_entropy_equal_torch_distributions():
    logits = 3 * torch.randn(50, 17, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(50) % 17
    logps, entropy = gather_logps(logits, targets, 0.7)
    reference = Categorical(logits=logits / 0.7)
    torch.testing.assert_close(logps, reference.log_prob(targets))
    torch.testing.assert_close(entropy, reference.entropy())


def test_logps_of_bf16_logits_are_taken_in_float32():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    logps, _ = gather_logps(logits, torch.zeros(4, dtype=torch.long), 1.0)
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps, torch.log_softmax(logits.float(), -1)[:, 0])


@pytest.mark.parametrize("max_tokens", [1, 10, 25, 1000])
def test_micro_batches_hold_every_sequence_once_within_the_limit(max_tokens):
    lengths = [3, 9, 1, 25, 12, 9, 4, 2]
    batches = by_tokens(lengths, max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(8))
    assert all(sum(lengths[i] for i in batch) <= max_tokens or len(batch) == 1 for batch in batches)


def test_rows_hold_every_sequence_once_within_the_capacity():
    lengths = [3, 9, 1, 25, 12, 9, 4, 2, 40]
    rows = best_fit(lengths, 26)
    assert sorted(i for row in rows for i in row) == list(range(9))
    assert all(sum(lengths[i] for i in row) <= 26 or len(row) == 1 for row in rows)
    packed = pack(sequences(lengths), 26)
    for start, ids in zip(packed.starts, sequences(lengths), strict=True):
        assert packed.input_ids.flatten()[start : start + len(ids)].tolist() == ids
        assert packed.position_ids.flatten()[start : start + len(ids)].tolist() == list(range(len(ids)))
