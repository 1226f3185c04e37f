"""examples/: each command of an example's first lines and of examples/README.md runs, with small settings and the
small chain as parent, and shows what it promises as far as an untrained model can.

Run: pytest tests/test_examples.py (the slow ones train the small chain first, about half a minute)
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from recipe_runs import ENV, ROOT, SMALL, log, manifest, run

from posttrain.data import tiny
from posttrain.tools import load_tools

EXAMPLES = ROOT / "examples"
COMMAND = re.compile(r"^ *((?:accelerate launch|posttrain|sh examples/)(?:.*\\\n)*.*)$", re.MULTILINE)
SMALL_REJECTION = {
    "num_rounds": 2, "num_prompts": 8, "num_generations": 4, "max_completion_length": 8, "batch_size": 4,
    "max_rows": 100, "reward_funcs": "recipe_runs.vowels", "threshold": 0.1, "warmup_steps": 0, "logging_steps": 1,
    "save_steps": 0, "eval_max_rows": 6, "eval_num_generations": 2, "eval_max_tokens": 8, "use_vllm": "false",
}  # fmt: skip


def commands(file: Path) -> list[str]:
    """The commands that stand on lines of their own, one line each."""
    text = file.read_text(encoding="utf-8")
    return [" ".join(found.replace("\\\n", " ").replace('"$@"', "").split()) for found in COMMAND.findall(text)]


def only(file: str, recipe: str) -> list[str]:
    """The words of the one command of an example's file that launches a recipe, from the recipe on."""
    [words] = [shlex.split(line) for line in commands(EXAMPLES / file) if f"recipes/{recipe}.py" in line]
    return words[words.index(f"recipes/{recipe}.py") :]


def small(words: list[str], out: Path, **changes) -> list[str]:
    """A recipe's words made small: settings of the small chain but for those that the words themselves give."""
    stage = Path(words[0]).stem
    settings = {**(SMALL_REJECTION if stage == "rejection" else SMALL[stage]), **changes, "output_dir": out}
    given = {word for word in words if word.startswith("--")} - {"--output_dir"}
    flags = [w for key, value in settings.items() if f"--{key}" not in given for w in (f"--{key}", str(value))]
    kept = [w for index, w in enumerate(words) if "--output_dir" not in (w, words[index - 1])]
    return [str(ROOT / kept[0]), *kept[1:], *flags]


def finished(words: list[str], out: Path, **changes) -> dict:
    done = run(small(words, out, **changes), out.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return manifest(out)


# ---- the folder and its page ----------------------------------------------------------------------------------------


def test_each_example_stands_in_the_table_and_in_a_test():
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    tests = {file: file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_*.py")}
    entries = [entry for entry in EXAMPLES.iterdir() if entry.name not in ("README.md", "__pycache__")]
    assert len(entries) >= 9
    for entry in entries:
        assert f"]({entry.name}" in page, f"examples/README.md: no link to {entry.name}"
        # Here a test gives an example's file as it stands behind examples/; elsewhere it names the path.
        names = (f'"{entry.name}', f"examples/{entry.name}", f"examples.{entry.stem}.")
        assert any(name in text for text in tests.values() for name in names), f"{entry}: no test names it"


def test_the_page_has_the_commands_of_the_files_and_no_others():
    files = [file for file in EXAMPLES.rglob("*") if file.suffix in (".py", ".jinja", ".yaml")]
    own = {
        line for file in files if not file.match("ranking_to_*/*") for line in commands(file)
    }  # that walks by itself
    own |= {f"sh examples/{file.name}" for file in EXAMPLES.glob("*.sh")}
    page = [line for line in commands(EXAMPLES / "README.md") if "ranking_to_" not in line]
    assert len(own) >= 9 and own <= set(page), own - set(page)
    for line in page:
        for word in shlex.split(line):
            named = re.fullmatch(r"(?:recipes|examples|chat_templates)/[\w./-]+", word)
            assert named is None or (ROOT / word).exists(), f"examples/README.md: no {word}"


# ---- one feature each -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_custom_reward(small_chain, tmp_path):
    from examples.short_reply import short

    assert short([], ["", "", ""], [[], [1] * 10, [1] * 60]) == [1.0, 0.8, 0.0]
    found = finished(only("short_reply.py", "grpo"), tmp_path / "out", model_name_or_path=small_chain / "sft")
    assert found["config"]["reward_weights"] == [1.0, 0.2]
    for each in log(tmp_path / "out", "rollouts.jsonl"):
        own = each["rewards"]["examples.short_reply.short"]
        assert own == pytest.approx(max(0, 1 - each["tokens"] / 50))
        assert each["reward"] == pytest.approx(each["rewards"]["correct"] + 0.2 * own)


@pytest.mark.slow
def test_custom_template(small_chain, tmp_path):
    from transformers import AutoTokenizer

    lines = commands(EXAMPLES / "custom_template/radio.jinja")
    assert posttrain(lines[0]).endswith("faults              none")
    words = only("custom_template/radio.jinja", "sft")
    finished(words, tmp_path / "out", model_name_or_path=small_chain / "pretrain")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    talk = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]
    said = tokenizer.apply_chat_template(talk, tokenize=False)
    assert said == "<|user|>ping<|over|><|assistant|>pong<|over|>" and tokenizer.eos_token == "<|over|>"
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    assert sum(each >= 400 for each in ids) == 4, "one new token each, behind the 400 of the small vocabulary"
    stops = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_tokens_to_ids("<|over|>") in (stops if isinstance(stops, list) else [stops])


@pytest.mark.slow
def test_lora_ppo(small_chain, tmp_path):
    parents = {"model_name_or_path": small_chain / "sft", "reward_model_path": small_chain / "reward"}
    found = finished(only("lora_ppo.sh", "ppo"), tmp_path / "out", **parents)
    assert found["config"]["use_peft"] is True and found["config"]["learning_rate"] == 2e-3
    assert (tmp_path / "out/adapter/adapter_model.safetensors").stat().st_size < 200_000
    old, new = (weights(folder) for folder in (small_chain / "sft", tmp_path / "out"))
    moved = {name for name, tensor in new.items() if not tensor.equal(old[name])}
    assert moved and all(".self_attn." in name or ".mlp." in name for name in moved), "the layers' matrices alone"


@pytest.mark.slow
def test_expert_iteration(small_chain, tmp_path):
    words = only("expert_iteration.sh", "rejection")
    found = finished(words, tmp_path / "out", model_name_or_path=small_chain / "sft")
    assert found["config"]["start_from"] == "last" and [line["round"] for line in found["rounds"]] == [0, 1, 2]
    assert found["rounds"][-1]["sampled"] == 2 * 8 * 4 and found["rounds"][-1]["kept"] > 0


@pytest.mark.slow
def test_two_processes(small_chain, tmp_path):
    """The same losses as one process has, batch by batch, but for the last bits."""
    launch = shlex.split(commands(EXAMPLES / "two_processes.sh")[0])
    at = launch.index("recipes/reward.py")
    settings = {"model_name_or_path": small_chain / "sft", "max_steps": 3, "learning_rate": 1e-4}
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", *launch[2:at]]
    two = shell(*accelerate, *small(launch[at:], tmp_path / "two", **settings), ACCELERATE_USE_CPU="true")
    assert "2 processes on cpu (gloo)" in two
    finished(launch[at:], tmp_path / "one", **settings)
    losses = [[line["loss"] for line in log(tmp_path / name) if "loss" in line] for name in ("one", "two")]
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
def test_own_data(small_chain, tmp_path):
    """The rows that the visitors liked, each with the clerk's words; the gate reads them without PYTHONPATH."""
    words = only("own_data/museum.py", "sft")
    chain = {"model_name_or_path": small_chain / "sft", "max_length": 512}
    said = posttrain(commands(EXAMPLES / "own_data/museum.py")[0].partition(" --html")[0], **chain)
    assert "the gate lets this stage train" in said and "4,000" not in said.splitlines()[0]
    found = finished(words, tmp_path / "out", **chain, max_rows=None)
    raw = [json.loads(line) for line in (EXAMPLES / "own_data/museum.jsonl").read_text().splitlines()]
    [source] = [each for each in found["data"] if "museum.jsonl" in json.dumps(each)]
    assert str(sum(row["stars"] >= 3 for row in raw)) in json.dumps(source)
    assert found["metrics"]["pass@1"]["n"] == 6


def test_own_datas_answers_are_those_that_the_museum_gives():
    """A held-out question's number stands in what well liked clerks said; no question is learned word by word."""
    folder = EXAMPLES / "own_data"
    raw, held_out = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("museum.jsonl", "museum_held_out.jsonl")
    )
    told = {int(number) for row in raw if row["stars"] >= 3 for number in re.findall(r"\d+", row["clerk"])}
    assert {row["number"] for row in held_out} == told and len(told) == 12
    assert not {row["visitor"] for row in held_out} & {row["visitor"] for row in raw}


def test_tool_use_shows_calls_whose_answers_are_the_tools_own():
    from examples.tool_use.products import conversations, problems

    [calculator] = load_tools(["calculator"])
    rows = list(tiny.rows("problems", "train", 60, seed=0))
    called = 0
    for talk, problem in zip(conversations(rows), problems(rows), strict=True):
        product = re.search(r"(\d+)\*(\d+)", talk["messages"][0]["content"])
        right = int(product[1]) * int(product[2])
        assert problem["prompt"] == talk["messages"][:1] and int(problem["answer"]) == right
        assert talk["messages"][-1]["content"] == f"The answer is {right}."
        if len(talk["messages"]) == 4:
            [call] = talk["messages"][1]["tool_calls"]
            assert calculator.call(call["function"]["arguments"]) == talk["messages"][2]["content"] == str(right)
            called += 1
    assert called == 30


@pytest.fixture(scope="module")
def tool_model(small_chain, tmp_path_factory):
    """What SFT of the example leaves."""
    out, words = tmp_path_factory.mktemp("tool_use") / "sft", only("tool_use/products.py", "sft")
    finished(words, out, model_name_or_path=small_chain / "sft", max_length=1024)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("file", ["tool_use/products.py", "word_count.py"])
def test_tool_use(tool_model, tmp_path, file):
    """The prompts of RL tell the model of the tools that the command names, in the example's own template."""
    found = finished(only(file, "grpo"), tmp_path / "grpo", model_name_or_path=tool_model, max_steps=2)
    own = file == "word_count.py"
    assert found["config"]["tools"] == ["calculator", *["examples.word_count.word_count"] * own]
    prompts = [each["prompt"] for each in log(tmp_path / "grpo", "rollouts.jsonl")]
    assert prompts and all("\ncalculator(expression): Works out" in prompt for prompt in prompts)
    assert all(("\nword_count(text, unit): Counts" in prompt) is own for prompt in prompts)


# ---- helpers --------------------------------------------------------------------------------------------------------


def weights(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def shell(*command, **env) -> str:
    """What a command printed; it must succeed. Without PYTHONPATH, as users run it: only the package is installed."""
    from os import environ

    env = {**environ, **ENV, "PYTHONPATH": "", **env}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def posttrain(line: str, **flags) -> str:
    words = shlex.split(line)
    assert words[0] == "posttrain"
    program = Path(sys.executable).with_name("posttrain")
    return shell(program, *words[1:], *(word for key, value in flags.items() for word in (f"--{key}", value)))
