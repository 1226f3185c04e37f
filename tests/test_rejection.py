"""Rejection sampling: what is right and chosen, the loss on sampled tokens, rounds that learn, the recipe itself.

Run: pytest tests/test_rejection.py (the slow ones train the small chain first, about half a minute)
"""

import json
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from recipe_runs import INT, KILL, ROOT, TERM, Running, call, log, manifest, refused, result, run
from rl_helpers import plain_logps, start_stage, tiny_llama, tiny_tokenizer
from test_doctor import share_of_a, talker
from test_processes import two

from posttrain import args, chain, stage
from posttrain.errors import UserError
from posttrain.rejection import RejectionTrainer, markdown
from posttrain.report import write_report
from posttrain.rl.rollout import HFEngine
from posttrain.rl.types import Completion
from posttrain.solutions import RejectionConfig, Solution, are_right, choose, select
from posttrain.training import OptimConfig

pytestmark = pytest.mark.usefixtures("restored_signals")


# ---- what is right, and which of it is learned ----------------------------------------------------------------------


def solutions(*texts: str) -> list[Solution]:
    """As many tokens as letters."""
    return [Solution(list(range(index, index + len(text))), None, text) for index, text in enumerate(texts)]


def texts(found: list[Solution]) -> list[str]:
    return [each.text for each in found]


FOUND = ("so it is 42", "42", "So  it is 42 ", "it is 42", "so it is 42")


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"max_kept": 9}, ["42", "it is 42", "so it is 42"]),
        ({"max_kept": 2}, ["42", "it is 42"]),
        ({"max_kept": 1, "choice": "common"}, ["so it is 42"]),
        ({"max_kept": 2, "choice": "common"}, ["so it is 42", "42"]),
        ({"max_kept": 4, "distinct": False}, ["42", "it is 42", "so it is 42", "so it is 42"]),
        ({"max_kept": 3, "choice": "common", "distinct": False}, ["so it is 42", "so it is 42", "So  it is 42 "]),
    ],
)
def test_choice(keys, expected):
    assert texts(choose(solutions(*FOUND), RejectionConfig(**keys), seed=0)) == expected


def test_a_random_choice_is_seeded_and_takes_all_in_turn():
    config = RejectionConfig(choice="random", max_kept=1)
    drawn = [texts(choose(solutions(*FOUND), config, seed)) for seed in range(60)]
    assert drawn == [texts(choose(solutions(*FOUND), config, seed)) for seed in range(60)]
    assert {text for [text] in drawn} == {"42", "it is 42", "so it is 42"}


def test_problems_are_chosen_from_one_by_one():
    found = [(7, each) for each in solutions("a", "a", "b")] + [(3, each) for each in solutions("a")]
    kept = select(found, RejectionConfig(max_kept=5), seed=0)
    assert [(row, each.text) for row, each in kept] == [(3, "a"), (7, "a"), (7, "b")]


def test_right_by_every_function_that_applies():
    values = {"correct": [1.0, 1.0, 0.0, None], "format": [1.0, 0.5, 1.0, 1.0]}
    rows = [{"row": 10 + index} for index in range(4)]
    assert are_right(values, 1.0, rows) == [True, False, False, True]
    assert are_right(values, 0.5, rows) == [True, True, False, True]
    with pytest.raises(UserError, match="row 11: all returned None"):
        are_right({"correct": [1.0, None]}, 1.0, rows)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"choice": "longest"}, "choice: found 'longest'"),
        ({"pool": "none"}, "pool: found 'none'"),
        ({"start_from": "middle"}, "start_from: found 'middle'"),
        ({"num_rounds": 0}, "num_rounds: found 0"),
        ({"num_prompts": 0}, "num_prompts: found 0"),
        ({"max_kept": 0}, "max_kept: found 0"),
        ({"batch_size": 0}, "batch_size: found 0"),
        ({"temperature": 0.0}, "temperature: found 0.0"),
        ({"reward_funcs": []}, "reward_funcs: found []"),
    ],
)
def test_a_config_that_cannot_be_meant(keys, words):
    with pytest.raises(UserError) as error:
        RejectionConfig(**keys)
    assert words in str(error.value)


# ---- training on sampled tokens -------------------------------------------------------------------------------------


def make(folder, policy, config: RejectionConfig, *, rewards=None, rate=1e-3, measure=None, engine=None):
    """A trainer over eight chat prompts that samples by `generate`."""
    from posttrain.chat import encode_chat

    tokenizer, optim = tiny_tokenizer(), OptimConfig(learning_rate=rate, warmup_steps=0, max_grad_norm=1e9)
    run = start_stage(folder, config, optim, name="rejection")
    talks = [[{"role": "user", "content": letter}] for letter in "abcdefgh"]
    prompts = [
        {"prompt": talk, "row": row, "prompt_ids": encode_chat(tokenizer, talk, add_generation_prompt=True).input_ids}
        for row, talk in enumerate(talks)
    ]
    figures = {"value": 0.0, "low": 0.0, "high": 0.0, "n": 1, "unit": ""}
    return RejectionTrainer(
        run, stage.accelerator(bf16=False), config, optim, policy=policy, tokenizer=tokenizer,
        engine=engine or HFEngine(policy, tokenizer.pad_token_id), prompts=prompts,
        stop_ids=(tokenizer.eos_token_id,), rewards=rewards or [("share of a", share_of_a, 1.0)],
        measure=measure or (lambda ends: ({"none": figures}, [])),
    )  # fmt: skip


BATCH = [
    (0, Solution([97, 98, 260], None, "ab")),
    (3, Solution([101] * 90, None, "e" * 90)),
    (5, Solution([97, 98, 99, 260], [1, 0, 0, 1], "a")),
]


def test_the_loss_is_the_mean_over_the_tokens_that_the_model_wrote(tmp_path):
    policy = tiny_llama()
    trainer = make(tmp_path / "out", deepcopy(policy), RejectionConfig())
    prompts = [row["prompt_ids"] for row in trainer.prompts]
    logps = [plain_logps(policy, prompts[row], each.ids) for row, each in BATCH]
    counted = torch.cat([logps[0], logps[1], logps[2][[0, 3]]])
    assert trainer._update(BATCH)["loss"] == pytest.approx(-counted.mean().item(), rel=1e-5)
    assert trainer.tokens == sum(len(prompts[row]) + len(each.ids) for row, each in BATCH)


def test_micro_batches_change_nothing(tmp_path):
    numbers = []
    for size in (1, 100_000):
        trainer = make(tmp_path / str(size), tiny_llama(), RejectionConfig(max_tokens_per_microbatch=size))
        numbers.append(trainer._update(BATCH))
    assert numbers[0]["loss"] == pytest.approx(numbers[1]["loss"], rel=1e-5)
    assert numbers[0]["grad_norm"] == pytest.approx(numbers[1]["grad_norm"], rel=1e-4)


SMALL = {"max_completion_length": 12, "num_generations": 15, "threshold": 0.6, "batch_size": 8}


def test_rounds_learn(tmp_path):
    """Right: 60 % or more of the letters are `a`, which one in five of the first replies is."""
    trainer = make(tmp_path / "out", deepcopy(talker()), RejectionConfig(**SMALL, num_epochs=3))
    trainer.train()
    right = [line["right"] for line in trainer.table[1:]]
    assert right[0] < 0.35 and right[2] > right[1] > right[0] and right[2] > 0.6, right
    assert [line["sampled"] for line in trainer.table] == [0, 120, 240, 360]
    kept = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert {line["round"] for line in kept} == {0, 1, 2}
    for line in kept:
        [question, answer] = line["messages"]
        assert question["role"] == "user" and answer["role"] == "assistant"
        assert share_of_a([], [answer["content"]], []) >= [0.6]
    assert all(len({line["row"] for line in kept if line["round"] == r}) <= 8 for r in range(3))


class Canned:
    """Says the same whatever the weights: a right answer in odd tokens, a wrong one and a cut one."""

    name = "canned"

    def sync_weights(self, model):
        pass

    def generate(self, prompts, sampling, seed):
        end = tiny_tokenizer().eos_token_id
        three = [([97, 97, end], "stop"), ([98, end], "stop"), ([97, 97, 97], "length")]
        return [Completion(list(ids), [0.0] * len(ids), stop) for _ in prompts for ids, stop in three]


CANNED = {"num_generations": 3, "batch_size": 8, "num_rounds": 2}


def letters(prompts, completions, completion_ids, **columns):
    return [float(set(ids) <= {97, tiny_tokenizer().eos_token_id}) for ids in completion_ids]


def test_sampled_tokens_are_learned_as_they_are_and_cut_ones_never(tmp_path):
    trainer = make(tmp_path / "out", tiny_llama(), RejectionConfig(**CANNED), rewards=[("letters", letters, 1.0)],
                   engine=Canned())  # fmt: skip
    trainer.round = 0
    trainer.sample()
    assert [(row, each.ids) for row, each in trainer.kept] == [
        (row, [97, 97, tiny_tokenizer().eos_token_id]) for row in range(8)
    ]
    assert trainer.found["right"] == pytest.approx(2 / 3), "the cut one is right, but not kept"


@pytest.mark.parametrize("start_from", ["first", "last"])
def test_where_a_round_starts_from(tmp_path, start_from):
    """The policy is spoilt after round 1. A round that starts from the first model does not see that."""

    def final(folder, spoil: bool):
        policy = tiny_llama()
        config = RejectionConfig(**CANNED, start_from=start_from)

        def measure(ends):
            if spoil and trainer.table and not ends:
                with torch.no_grad():
                    for parameter in policy.parameters():
                        parameter.mul_(0.5)
            return {"none": {"value": 0.0, "low": 0.0, "high": 0.0, "unit": ""}}, []

        trainer = make(folder, policy, config, rewards=[("letters", letters, 1.0)], engine=Canned(), measure=measure)
        trainer.train()
        return torch.cat([p.detach().flatten() for p in policy.parameters()])

    same = torch.equal(final(tmp_path / "a", spoil=False), final(tmp_path / "b", spoil=True))
    assert same == (start_from == "first")


@pytest.mark.parametrize(("pool", "kept"), [("round", [4, 4]), ("all", [4, 8])])
def test_the_pool(tmp_path, pool, kept):
    config = RejectionConfig(**CANNED, pool=pool, num_prompts=4)
    trainer = make(tmp_path / "out", tiny_llama(), config, rewards=[("letters", letters, 1.0)], engine=Canned())
    trainer.train()
    assert [line["kept"] for line in trainer.table[1:]] == kept


def test_nothing_right_is_refused(tmp_path):
    trainer = make(tmp_path / "out", tiny_llama(), RejectionConfig(**{**SMALL, "threshold": 2.0}))
    with pytest.raises(UserError, match="round 1: none of 120 solutions of 8 problems is right"):
        trainer.train()


def test_the_table():
    figure = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9, "unit": "%"}
    lines = [
        {"round": 0, "sampled": 0, "updates": 0, "metrics": {"pass@1": figure, "pass@1, at once": figure}},
        {"round": 1, "sampled": 4500, "right": 0.437, "kept": 300, "metrics": {"pass@1": figure}},
    ]
    assert markdown(lines).splitlines()[2:] == [
        "| 0 | 0 | – | 0 | 50.0 % [40.0, 60.0] |", "| 1 | 4,500 | 43.7% | 300 | 50.0 % [40.0, 60.0] |",
    ]  # fmt: skip


# ---- the recipe -----------------------------------------------------------------------------------------------------

RECIPE = {
    "max_rows": 100, "num_rounds": 3, "num_prompts": 8, "num_generations": 12, "max_completion_length": 8,
    "reward_funcs": "recipe_runs.vowels", "threshold": 0.01, "max_kept": 3, "batch_size": 2, "warmup_steps": 2,
    "num_epochs": 4, "eval_max_rows": 6, "eval_num_generations": 2, "eval_max_tokens": 8, "use_vllm": "false",
}  # fmt: skip


def recipe(small_chain: Path, out: Path, **changes) -> list[str]:
    settings = {**RECIPE, "model_name_or_path": small_chain / "sft", "output_dir": out, **changes}
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return [str(ROOT / "recipes/rejection.py"), "--config", str(ROOT / "recipes/tiny/rejection.yaml"), *flags]


def outcome(folder: Path) -> dict:
    return {**result(folder), "rounds": manifest(folder)["rounds"], "kept": log(folder, "samples.jsonl")}


@pytest.fixture(scope="module")
def uninterrupted(small_chain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = run(recipe(small_chain, folder / "rejection"), folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "rejection"


@pytest.mark.slow
def test_what_the_recipe_leaves(uninterrupted):
    found = manifest(uninterrupted)
    assert found["stage"] == "rejection" and [line["round"] for line in found["rounds"]] == [0, 1, 2, 3]
    assert [line["sampled"] for line in found["rounds"]] == [0, 96, 192, 288]
    for line in found["rounds"]:
        assert {"pass@1", "pass@2", "reply length"} <= line["metrics"].keys()
        assert all(each["low"] <= each["value"] <= each["high"] for each in line["metrics"].values())
    assert found["metrics"]["pass@1, before"] == found["rounds"][0]["metrics"]["pass@1"]
    assert found["metrics"]["pass@1"] == found["rounds"][3]["metrics"]["pass@1"]
    assert found["gains"][0]["name"] == "problems, pass@1"
    steps = [line["step"] for line in log(uninterrupted)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 36 and not (uninterrupted / "checkpoints").exists()
    page = write_report(uninterrupted.parent, ["rejection"]).read_text()
    assert "By round" in page and page.count('<th scope="row">') >= 4


@pytest.mark.slow
@pytest.mark.parametrize("number", [KILL, TERM, INT], ids=lambda number: number.name)
@pytest.mark.parametrize("at", [6, 30], ids=["round 1", "later"])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(small_chain, tmp_path, uninterrupted, number, at):
    out = tmp_path / "rejection"
    arguments = recipe(small_chain, out, save_steps=3 if number == KILL else 0)
    done = Running(arguments, tmp_path).stop_at(at, number, out)
    assert done.returncode == {KILL: -9, TERM: 143, INT: 130}[number] and not (out / "stage.json").exists(), (
        done.stderr
    )
    again = run(arguments, tmp_path)
    assert again.returncode == 0 and f"resuming {out} at step" in again.stdout, again.stderr
    assert outcome(out) == outcome(uninterrupted)


@pytest.mark.slow
def test_two_processes_share_the_problems(small_chain, tmp_path):
    done = two(*recipe(small_chain, tmp_path / "two", pool="round"))
    assert done.returncode == 0, done.stderr
    found = manifest(tmp_path / "two")
    assert found["machine"]["world_size"] == 2 and found["rounds"][-1]["sampled"] == 288
    rows = {line["row"] for line in log(tmp_path / "two", "samples.jsonl") if line["round"] == 0}
    one = {line["row"] for line in log(tmp_path / "two", "samples.jsonl") if line["round"] == 1}
    assert rows and one and not rows & one, "rounds take other problems"
    odd = two(*recipe(small_chain, tmp_path / "odd", batch_size=3))
    assert odd.returncode != 0 and "error: batch_size: found 3, expected a multiple of the 2 processes" in odd.stderr


@pytest.mark.slow
def test_the_dry_run_and_bad_input(small_chain, tmp_path):
    module = chain.import_recipe(ROOT / "recipes/rejection.py")
    arguments = recipe(small_chain, tmp_path / "out", reward_funcs="correct")[1:]
    assert module.check(arguments)["num_rounds"] == 3
    assert module.check([*arguments, "--model_name_or_path", "runs/x/sft"], planned={"runs/x/sft"})
    for words, said in {
        ("--reward_funcs", "corect"): "corect",
        ("--model_name_or_path", "./nowhere"): "nowhere",
        ("--choice", "best"): "choice: found 'best'",
        ("--num_round", "2"): "num_round",
    }.items():
        with pytest.raises(UserError, match=said):
            module.check([*arguments, *words])
    done = run(recipe(small_chain, tmp_path / "out", threshold=2.0), tmp_path)
    refused(done, "round 1: none of 96 solutions", "easier problems")
    assert args.parse(module.ARGS, arguments)


@pytest.mark.slow
def test_the_comparison_with_grpo_runs(small_chain, tmp_path):
    script, out = ROOT / "tests" / "benchmarks" / "rejection_vs_grpo.py", tmp_path / "out"
    size = [
        "--rounds",
        1,
        "--steps",
        2,
        "--num_prompts",
        16,
        "--max_tokens",
        8,
        "--eval_rows",
        6,
        "--use_vllm",
        "false",
    ]
    reward = ["--reward", "recipe_runs.vowels", "--threshold", 0.01, "--choices", "shortest", "--seeds", 0, 1]
    folders = ["--model", small_chain / "sft", "--work", tmp_path / "work", "--out", out]
    done = call([sys.executable, script, *folders, *size, *reward])
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((out / "rejection_vs_grpo.json").read_text())
    assert [(each["name"], each["seed"]) for each in found["curves"]] == [
        ("grpo", 0), ("grpo", 1), ("shortest", 0), ("shortest", 1),
    ]  # fmt: skip
    for each in found["curves"]:
        first, last = each["points"]
        assert (first["sampled"], last["sampled"]) == (0, 256 if each["name"] == "grpo" else 255)
        before = next(one["points"][0]["value"] for one in found["curves"] if one["seed"] == each["seed"])
        assert first["value"] == before, "both are measured on the same problems in the same way"
    assert "| rejection, shortest |" in (out / "rejection_vs_grpo.md").read_text()
