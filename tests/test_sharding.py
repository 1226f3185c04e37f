"""FSDP2 on two real processes (gloo): the updates, checkpoints and weights are those of one process.

Run: pytest tests/test_sharding.py. It launches itself again, as two processes, by the shipped Accelerate file; the
oracle is plain torch on a whole model in the same process.
"""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from posttrain.errors import entry

ROOT = Path(__file__).parents[1]
ROWS = torch.randint(50, (6, 10), generator=torch.Generator().manual_seed(3))
RATE = 1e-2


def llama(tied=True, seed=0):
    """30,000 parameters; 50 rows of embeddings and 33 of the MLP do not divide evenly among processes of 4 or 2."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=33, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=tied, initializer_range=0.1, eos_token_id=None,
        bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class SomeLogps(nn.Module):
    """As the RL loop computes: the backbone past the model's own forward, the head on chosen positions alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, rows):
        hidden = self.model.model(input_ids=rows, use_cache=False).last_hidden_state[:, 2:-1]
        logits = self.model.get_output_embeddings()(hidden)
        return nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 3:].flatten(), reduction="sum")


def plain_steps(model, count, max_norm=0.5):
    """Losses and gradient norms of `count` steps of one process: torch alone."""
    module, found = SomeLogps(model), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(count):
        optimizer.zero_grad()
        loss = module(ROWS) / 42
        loss.backward()
        found.append((loss.item(), nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()))
        optimizer.step()
    return found


def updater_of(model, accelerator, rate=RATE, **keys):
    from posttrain.training import OptimConfig, Updater

    config = OptimConfig(learning_rate=rate, warmup_steps=0, max_grad_norm=0.5)
    return Updater(SomeLogps(model), accelerator, config, 10, **keys)


def steps(updater, count):
    """Three micro-batches on the first process, one on the second: their forwards must be made equal."""
    rank = updater.accelerator.process_index
    batches = [ROWS[:1], ROWS[1:2], ROWS[2:3]] if rank == 0 else [ROWS[3:]]
    numbers, seen = [], []

    def share(batch):
        seen.append(updater.padding)
        return updater.model(batch) / 42

    for _ in range(count):
        numbers.append(updater.step(batches, share, lambda: "none"))
    assert seen == ([False] * 3 if rank == 0 else [False, True, True]) * count
    return [(n["loss"], n["grad_norm"]) for n in numbers]


# --- what each of the two processes runs


def updates(accelerator, folder):
    from posttrain.sharding import full

    for tied in (True, False):
        alone, model = llama(tied), llama(tied, seed=accelerator.process_index)  # starts from the first process
        updater = updater_of(model, accelerator)
        for found, expected in zip(steps(updater, 3), plain_steps(alone, 3), strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
        for (name, part), whole in zip(model.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(full(part), whole.detach(), atol=1e-5, rtol=1e-4, msg=name)
            assert part.to_local().numel() <= (whole.shape[0] + 1) // 2 * whole[0].numel(), name
            moment = updater.optimizer.state[part]["exp_avg"]
            assert moment.to_local().shape == part.to_local().shape, name


def bf16(accelerator, folder):
    """Gathered weights and arithmetic in bf16; shards, gradients and moments in fp32."""
    alone, model = llama(), llama()
    updater = updater_of(model, accelerator)
    found, expected = steps(updater, 2), plain_steps(alone, 2)
    assert all(a == pytest.approx(b, rel=2e-2) and a != b for a, b in zip(found, expected, strict=True))
    state = [value for values in updater.optimizer.state.values() for value in values.values()]
    assert {tensor.dtype for tensor in (*model.parameters(), *state)} == {torch.float32}
    assert updater.model(ROWS).dtype == torch.float32


def resume(accelerator, folder):
    from posttrain.sharding import full, full_state, load_full_state

    straight, model = llama(), llama()
    updater = updater_of(model, accelerator)
    steps(updater, 2)
    parts = {"weights": full_state(model), "updater": updater.state()}
    if accelerator.is_main_process:
        torch.save(parts, f"{folder}/two.pt")
        model.save_pretrained(f"{folder}/two", state_dict=parts["weights"])
    else:
        assert parts["weights"] == parts["updater"]["optimizer"] == {}
    accelerator.wait_for_everyone()
    last = steps(updater, 2)
    weights = [full(p) for p in model.parameters()]

    again = updater_of(straight, accelerator)
    saved = torch.load(f"{folder}/two.pt")
    load_full_state(straight, saved["weights"])
    again.load_state(saved["updater"])
    assert again.updates == 2 and steps(again, 2) == last
    assert all(torch.equal(full(p), q) for p, q in zip(straight.parameters(), weights, strict=True))
    with pytest.raises(KeyError, match=r"model.norm.weight"):
        load_full_state(straight, {k: v for k, v in saved["weights"].items() if k != "model.norm.weight"})
    if accelerator.is_main_process:
        torch.save({"weights": weights, "last": last}, f"{folder}/four.pt")


def stops(accelerator, folder):
    from posttrain.errors import UserError
    from posttrain.sharding import full

    model = llama()
    updater = updater_of(model, accelerator)
    steps(updater, 1)
    before = [full(p).clone() for p in model.parameters()]
    bad = float("nan") if accelerator.process_index == 1 else 1.0
    with pytest.raises(UserError, match="update 2: loss nan.*stopped before it"):
        updater.step([ROWS], lambda batch: updater.model(batch) * bad, lambda: "row 3")
    assert all(torch.equal(full(p), old) for p, old in zip(model.parameters(), before, strict=True))
    assert updater.updates == 1 and torch.isfinite(torch.tensor(steps(updater, 1))).all()


def weights(accelerator, folder):
    from posttrain import sharding
    from posttrain.lora import LoraArgs, add_adapter, merged_weights, save_model

    for tied, adapted in ((True, False), (False, True), (True, True)):
        model, alone = llama(tied), llama(tied)
        for each in (model, alone) if adapted else ():
            torch.manual_seed(1)
            add_adapter(each, LoraArgs(use_peft=True, lora_r=4), token_ids=[2, 49])
            with torch.no_grad():
                [p.add_(torch.randn(p.shape) / 10) for p in each.parameters() if p.requires_grad]
        expected = dict(merged_weights(alone))
        updater = updater_of(model, accelerator, rate=1e-9)  # AdamW moves no weight that float32 would show
        steps(updater, 1)
        sent = list(sharding.full_weights(model))
        assert len(sent) == len(expected) and ("lm_head.weight" in expected) != tied
        for name, weight in sent:
            torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-6, msg=name)
        assert sharding.is_sharded(model)
        with sharding.gathered(updater.model):  # as many forwards as each likes
            for _ in range(1 + accelerator.process_index):
                new = model.generate(ROWS[:1], max_new_tokens=2 + 3 * accelerator.process_index, do_sample=False)
        assert new.tolist() == alone.generate(ROWS[:1], max_new_tokens=new.shape[1] - 10, do_sample=False).tolist()
        assert sharding.is_sharded(model) and steps(updater, 1)
        kind, tie = type(alone.model.layers[0]), sharding.unshard(updater.model).model
        assert tie is model and type(model.model.layers[0]) is kind and not sharding.is_sharded(model)
        if not adapted:
            assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        if accelerator.is_main_process:  # plain again: alone, the others take no part
            torch.testing.assert_close(model(ROWS).logits, alone(ROWS).logits, atol=1e-5, rtol=1e-4)
            save_model(model, f"{folder}/whole")


def uneven(accelerator, folder):
    """Inside `gathered` one process may look at its model as often as it likes: training goes on with the others."""
    from posttrain.sharding import gathered

    alone, model = llama(), llama()
    updater = updater_of(model, accelerator)
    found = steps(updater, 1)
    with gathered(updater.model), torch.no_grad():
        for _ in range(3 if accelerator.is_main_process else 0):
            model(torch.tensor([[1, 2, 3]]), use_cache=False)
    found += steps(updater, 2)
    for numbers, expected in zip(found, plain_steps(alone, 3), strict=True):
        assert numbers == pytest.approx(expected, rel=1e-5)


SECTIONS = {section.__name__: section for section in (updates, uneven, resume, stops, weights, bf16)}


def on_each_process(table: dict, folder: str, *sections: str) -> None:
    """Run sections of a table of functions, and leave a file for each that ended, with what the process runs on."""
    from posttrain import processes, stage

    process = processes.join()
    accelerator = stage.accelerator(bf16=sections == ("bf16",))
    for section in sections:
        table[section](accelerator, folder)
        Path(f"{folder}/{section}-{process.process_index}").write_text(processes.describe(process))


# --- the tests


def launch_sections(config: Path, script: str, folder: Path, *groups: list[str]) -> str:
    """Launch `script` by an Accelerate file as two processes, once a group of sections; what they said."""
    from recipe_runs import call

    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", 2]
    return "".join(call([*launch, script, folder, *sections]).stderr for sections in groups)


def assert_both_ended(launched: tuple[Path, str], section: str, sharding: str) -> None:
    folder, said = launched
    for rank in (0, 1):
        file = folder / f"{section}-{rank}"
        assert file.is_file(), said[-4000:]
        assert file.read_text() == f"2 processes on cpu (gloo), {sharding}: parameters in 2 shards"


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """(folder, what the processes said) of the sections in fp32, which share a launch, and of bf16."""
    folder, config = tmp_path_factory.mktemp("sharded"), ROOT / "recipes/accelerate/fsdp2.yaml"
    plain = [name for name in SECTIONS if name != "bf16"]
    return folder, launch_sections(config, __file__, folder, plain, ["bf16"])


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_two_sharded_processes_are_one(launched, section):
    assert_both_ended(launched, section, "FSDP2")


@pytest.mark.slow
def test_a_sharded_checkpoint_goes_on_in_one_process(launched):
    from transformers import AutoModelForCausalLM

    from posttrain import stage
    from posttrain.sharding import load_full_state

    folder, _ = launched
    saved, after = torch.load(folder / "two.pt"), torch.load(folder / "four.pt")
    model = llama(seed=1)
    updater = updater_of(model, stage.accelerator(False))
    load_full_state(model, saved["weights"])
    updater.load_state(saved["updater"])
    written = AutoModelForCausalLM.from_pretrained(folder / "two").state_dict()
    assert all(torch.equal(written[name], weight) for name, weight in model.state_dict().items())
    for expected in after["last"]:
        numbers = updater.step([ROWS], lambda batch: updater.model(batch) / 42, lambda: "")
        assert (numbers["loss"], numbers["grad_norm"]) == pytest.approx(expected, rel=1e-4)
    for found, expected in zip(model.parameters(), after["weights"], strict=True):
        torch.testing.assert_close(found.detach(), expected, atol=1e-5, rtol=1e-4)


def test_a_model_that_is_not_sharded_is_left_alone():
    from posttrain import sharding

    model = llama()
    assert not sharding.is_sharded(model) and sharding.unshard(model) is model
    with sharding.gathered(model) as same:
        assert same is model
    assert dict(sharding.full_weights(model)).keys() == dict(model.named_parameters()).keys()
    other = llama(seed=1)
    sharding.load_full_state(other, sharding.full_state(model))
    assert torch.equal(other(ROWS).logits, model(ROWS).logits)
    with pytest.raises(ValueError, match="the model has no a stray"):
        sharding.load_full_state(other, {**model.state_dict(), "a stray": torch.zeros(1)})


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("FSDP_VERSION", "1", "fsdp_version: found 1, expected 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: found true, expected false"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "all processes but one would start from empty weights"),
    ],
)
def test_what_would_be_ignored_is_refused(monkeypatch, variable, value, words):
    from posttrain import processes
    from posttrain.errors import UserError

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert processes.asked() == "fsdp2"
    with pytest.raises(UserError, match="sft: no FSDP2 here"):
        processes.refuse_shards("sft", "TRL's Trainer")
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=words):
        processes.asked()


if __name__ == "__main__":
    entry(lambda: on_each_process(SECTIONS, *sys.argv[1:]))  # leaves the group as the recipes do
