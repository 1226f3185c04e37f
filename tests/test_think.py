"""Tokens to think: what is cut, put and counted, bit by bit; template tags; the suite, its picture, `--again`.

Run: pytest tests/test_think.py
"""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from posttrain import think
from posttrain.chat import set_template, stop_ids
from posttrain.cli import command
from posttrain.data import tiny
from posttrain.errors import UserError
from posttrain.evals import EVAL_SEED, ReplyConfig, prompt_ids, sample_replies
from posttrain.models import save_pair
from posttrain.plots import thinking_plot
from posttrain.report_page import evaluations
from posttrain.report_read import Stage, _evals
from posttrain.rl.engine import Sampling
from posttrain.rl.hf_engine import HFEngine
from posttrain.rl.types import Completion
from posttrain.suite_think import Settings, Thinker
from posttrain.think import Frame, Parts, Tags, Words

WORDS = Words("The answer", "Ones", " The answer", " Wait")
TEMPLATES = Path(__file__).parents[1] / "chat_templates"


@pytest.fixture(scope="module")
def frame(tokenizer) -> Frame:
    return Frame.of(tokenizer, WORDS)


@pytest.fixture(scope="module")
def ids(tokenizer):
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass
class Scripted:
    """An engine that says the given ids one after another, cut at what it is asked for, and keeps the questions."""

    answers: list[list[int]]
    stops: tuple[int, ...]
    asked: list = field(default_factory=list)

    def generate(self, prompts, sampling: Sampling, seed: int) -> list[Completion]:
        self.asked.append((prompts, sampling.max_tokens))
        said = [self.answers.pop(0)[: sampling.max_tokens] for _ in prompts]
        return [Completion(s, [-1.0] * len(s), "stop" if s[-1] in self.stops else "length") for s in said]


def replies(frame, ids, stop, *texts: str) -> list[Completion]:
    """Replies that began with "Ones", were sampled as these texts, and ended."""
    engine = Scripted([[*ids(text), stop] for text in texts], (stop,))
    return think.begin(engine, [[1]] * len(texts), frame.in_steps, Sampling(1, 99, (stop,)), 0)


def test_a_budget_beyond_every_reply_leaves_the_very_ids_of_replies_without_one(model, tokenizer, frame):
    """The other way to the same ids: the stages' own evaluation with a prefix. Tokens that end a reply are many, so
    that a random model ends at many lengths."""
    rows, n, ends = list(tiny.rows("problems", "test", 12, 0)), 4, tuple(range(60, 110))
    engine, sampling = HFEngine(model, 0), Sampling(4, 24, ends)
    prompts = [prompt_ids(tokenizer, row) for row in rows]
    each = [prompt for prompt in prompts for _ in range(n)]
    thoughts = think.begin(engine, prompts, frame.in_steps, sampling, EVAL_SEED)
    assert len({len(thought.ids) for thought in thoughts}) > 5
    config = ReplyConfig(eval_num_generations=n, eval_max_tokens=24)
    plain = sample_replies(engine, tokenizer, rows, config, ends, "Ones").completions
    first = len(frame.in_steps)
    ended = [place for place, thought in enumerate(thoughts) if thought.stop == "stop"]
    short = Sampling(n, 5, ends)
    found = think.within(engine, frame, each, thoughts, 24, short, EVAL_SEED)
    assert 0 < len(ended) < len(found)
    for place, (mine, other) in enumerate(zip(found, plain, strict=True)):
        if place in ended:
            assert (mine.ids, mine.stop) == (other.ids, other.stop)
        else:  # it had thought 24 tokens and was not through
            assert mine.ids[: len(other.ids)] == other.ids and len(other.ids) == first + 24
            assert mine.ids[len(other.ids) :][: len(frame.answer)] == frame.answer
    cut = think.within(engine, frame, each, thoughts, 3, short, EVAL_SEED)
    again = think.within(engine, frame, each, thoughts, 3, short, EVAL_SEED)
    assert [c.ids for c in cut] == [c.ids for c in again]
    for mine, other in zip(cut, plain, strict=True):
        assert mine.ids[: first + 3] == other.ids[: first + 3]  # what was sampled stays
        assert len(mine.ids) <= first + 3 + len(frame.answer) + 5
        assert mine.mask.count(0) in (first, first + len(frame.answer))
        assert len(mine.mask) == len(mine.logps) == len(mine.ids)


def test_tokens_are_counted_as_the_pieces_that_were_said(tokenizer, frame, ids):
    stop = stop_ids(tokenizer)[-1]
    thought, answer, wrong = ": 1+2=3. Tens: 4+5=9.", " The answer is 93.", " No idea."
    through, silent = replies(frame, ids, stop, thought + answer, thought + wrong)
    first = len(frame.in_steps)
    size = {text: len(ids(text)) for text in (thought, answer, WORDS.answer)}
    assert ids(thought + answer) == ids(thought) + ids(answer)  # else the pieces would be no oracle
    assert think.parts(frame, through) == Parts(size[thought], first, size[answer] + 1)
    assert think.parts(frame, silent) == Parts(len(ids(thought + wrong)), first, 1)  # its end token is the answer
    engine = Scripted([[*ids(" is 4."), stop]], (stop,))
    [cut] = think.within(engine, frame, [[7, 8]], [through], 5, Sampling(1, 9, (stop,)), 0)
    assert engine.asked == [([[7, 8, *frame.in_steps, *ids(thought)[:5], *frame.answer]], 9)]
    assert cut.ids == [*frame.in_steps, *ids(thought)[:5], *frame.answer, *ids(" is 4."), stop]
    assert think.parts(frame, cut) == Parts(5, first + size[WORDS.answer], len(ids(" is 4.")) + 1)
    assert sum(vars(think.parts(frame, cut)).values()) == len(cut.ids)
    for budget in (size[thought], size[thought] + 1, 99):  # it ended its thoughts by itself within these
        assert think.within(Scripted([], ()), frame, [[7]], [through], budget, Sampling(1, 9, (stop,)), 0) == [through]
    assert think.parts(frame, through, at_once=True) == Parts(0, first, size[thought] + size[answer] + 1)


def test_thoughts_that_end_too_early_are_made_to_go_on(tokenizer, frame, ids):
    """Once, twice, and never more than MOST_WAITS times; the end that is taken back is none of the reply."""
    stop = stop_ids(tokenizer)[-1]
    thought, answer = ": 1+2=3.", " The answer is 3."
    once = replies(frame, ids, stop, thought + answer)
    size, wait = len(ids(thought)), frame.go_on
    engine = Scripted([[*ids(thought + answer), stop], [*ids(thought + answer), stop]], (stop,))
    [found] = think.at_least(engine, frame, [[7]], once, 2 * size + len(wait) + 1, Sampling(1, 200, (stop,)), 0)
    expected = [*ids(thought), *wait, *ids(thought), *wait, *ids(thought)]
    assert found.ids == [*frame.in_steps, *expected, *ids(answer), stop] and found.stop == "stop"
    assert think.parts(frame, found) == Parts(3 * size, len(frame.in_steps) + 2 * len(wait), len(ids(answer)) + 1)
    room = [most for _, most in engine.asked]  # thought and answer together stay within max_tokens
    assert room == [200 - size - len(wait), 200 - 2 * size - 2 * len(wait)]
    stubborn = Scripted([[stop]] * think.MOST_WAITS, (stop,))
    [found] = think.at_least(stubborn, frame, [[7]], once, 190, Sampling(1, 200, (stop,)), 0)
    assert found.ids == [*frame.in_steps, *ids(thought), *wait * think.MOST_WAITS, stop]
    assert think.at_least(Scripted([], ()), frame, [[7]], once, size, Sampling(1, 200, (stop,)), 0) == once


@pytest.mark.parametrize("name", ["qwen3", "qwen3_keep_thinking", "deepseek_r1"])
def test_tags_are_those_that_the_template_writes(base_tokenizer, model, tmp_path, name):
    """Prompt, thoughts and answer put together by hand are transformers' own render of the turn."""
    from copy import deepcopy

    tokenizer = deepcopy(base_tokenizer)
    from conftest import new_llama

    set_template(tokenizer, new_llama(tokenizer), str(TEMPLATES / f"{name}.jinja"))
    tags, ask = think.tags_of(tokenizer), [{"role": "user", "content": "4+5?"}]
    turn = {"role": "assistant", "reasoning_content": "4, 5 ... 9", "content": "The answer is 9."}
    whole = tokenizer.apply_chat_template([*ask, turn], tokenize=False)
    prompt = tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True)
    assert whole.startswith(f"{prompt}{tags.opening}4, 5 ... 9{tags.closing}The answer is 9.")
    if name != "deepseek_r1":
        empty = tokenizer.apply_chat_template(ask, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        assert empty == prompt + tags.opening + tags.closing
    assert (tags.opening == "") is (name == "deepseek_r1")
    frame = Frame.of(tokenizer, Words("The answer is", "", f"{tags.closing}The answer is", " Wait"))
    assert tokenizer.decode(frame.at_once) == f"{tags.opening}{tags.closing}The answer is"
    said = tokenizer("Maybe \\boxed{8}. The answer is 8?\n</think>\n\nSo 9.", add_special_tokens=False)["input_ids"]
    reply = think.begin(Scripted([said], ()), [[1]], frame.in_steps, Sampling(1, 99, ()), 0)[0]
    assert frame.decode(reply.ids[frame.end_of_thoughts(reply) :]).lstrip() == "</think>\n\nSo 9."
    thinker = Thinker.__new__(Thinker)  # no model answers here: what of a reply is judged
    thinker.frame, thinker.tokenizer, thinker.rows = frame, tokenizer, [{"prompt": ask, "answer": "9"}]
    assert thinker.right({"in steps": [reply]}, 1) == {"in steps": [[1.0]]}  # the thoughts' own answers do not count
    plain = Completion(tokenizer("The answer is 9.", add_special_tokens=False)["input_ids"], [], "stop")
    judged = thinker.right({"free": [plain]}, 1)["free"][0]  # it opened no thoughts, where it had to open them itself
    assert judged == ([0.0] if name == "deepseek_r1" else [1.0])
    with pytest.raises(UserError, match="--answer: found ' The answer', which does not close the template's thoughts"):
        Frame.of(tokenizer, WORDS)


def test_a_template_without_thoughts_has_no_tags(tokenizer):
    assert think.tags_of(tokenizer) is None
    with pytest.raises(UserError, match="--at_once: found an empty text, and the template has no tags"):
        Frame.of(tokenizer, Words(" ", "Ones", " So", " Wait"))


def test_deepseeks_own_template_opens_thoughts_and_drops_them(base_tokenizer):
    from copy import deepcopy

    tokenizer = deepcopy(base_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
    )
    assert think.tags_of(tokenizer) == Tags("", "\n</think>\n\n")


# --- the suite


ASK = ("--suite", "think", "--data", "tiny", "--rows", "4", "--num_generations", "2", "--max_tokens", "12",
       "--use_vllm", "false")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, tokenizer) -> Path:
    path = tmp_path_factory.mktemp("think") / "chat"
    save_pair(model, tokenizer, path)
    assert command(["eval", str(path), *ASK, "--budgets", "0", "2", "8", "--at_least", "4"]) == 0
    return path


def test_the_suite_stores_a_curve_that_repeats(folder, capsys, tmp_path):
    told = json.loads((folder / "evals/think.json").read_text())
    curve = {point["label"]: point for point in told["details"]["curve"]}
    assert list(curve) == ["at once", "at most 2", "at most 8", "in steps", "at least 4", "free"]
    for label, point in curve.items():
        assert point["thinking"] + point["forced"] + point["answer"] == pytest.approx(point["tokens"]["value"])
        assert told["metrics"][f"reply length, {label}"]["value"] == point["tokens"]["value"]
    assert curve["at once"]["thinking"] == 0 and curve["free"]["forced"] == 0 and curve["at most 2"]["thinking"] <= 2
    assert told["metrics"]["pass@1, in steps less at once"]["unit"] == "points"
    assert told["settings"]["at_once"] == "The answer" and told["settings"]["answer"] == " The answer"
    assert "](think.svg)" in (folder / "evals/think.md").read_text()
    svg = (folder / "evals/think.svg").read_text()
    assert "tokens a reply: at once, at most 2 to 8, in steps, at least 4" in svg
    assert command(["eval", "--again", str(folder / "evals/think.json")]) == 0
    assert "figures are equal" in capsys.readouterr().out
    other = shutil.copytree(folder, tmp_path / "other")
    assert command(["eval", str(other), *ASK, "--temperature", "0", "--num_generations", "1"]) == 0
    greedy = json.loads((other / "evals/think.json").read_text())
    assert greedy["settings"]["budgets"] == [0, 1, 2, 4, 8]  # powers of two below max_tokens
    for name in ("at once", "in steps"):
        assert greedy["metrics"][f"pass@1, {name}"] == greedy["metrics"][f"greedy, {name}"]
        assert greedy["metrics"][f"greedy, {name}"] == told["metrics"][f"greedy, {name}"]


def test_the_report_shows_the_picture_and_refuses_a_curve_that_is_none(folder):
    stage = Stage("chat", "finished", evals=_evals(folder))
    [table] = evaluations([stage])
    [(name, picture)] = table["pictures"]
    assert name == "chat: right answers against tokens a reply"
    assert "temperature 0" in picture and "pass@2" in picture
    curve = stage.evals["think"]["details"]["curve"]
    for broken in (
        [],
        "none",
        [{}],
        [{**curve[0], "greedy": {"value": None}}],
        [{**curve[0], "pass@1": float("nan")}],
    ):
        stage.evals["think"]["details"]["curve"] = broken
        with pytest.raises(UserError, match=r"chat/evals/think.json: details.curve cannot be drawn .*evaluate again"):
            evaluations([stage])


def test_the_axis_of_tokens_is_logarithmic():
    figure = {"value": 0.5, "low": 0.4, "high": 0.6}
    labels = zip(("at once", "at most 4", "in steps", "free"), (8, 16, 64, 999), strict=True)
    curve = [{"label": label, "tokens": {"value": size}, "greedy tokens": {"value": size}, "greedy": figure,
              "pass@1": figure} for label, size in labels]  # fmt: skip
    svg = str(thinking_plot(curve))
    first = [float(x) for x in re.findall(r'class="dot c0" cx="([\d.]+)"', svg)]
    assert len(first) == 3  # the reply that the model gives by itself is no point of the curve
    assert (first[2] - first[1]) / (first[1] - first[0]) == pytest.approx(2, rel=0.01)
    assert re.findall(r'class="tick mid"[^>]*>([\d.]+)<', svg) == ["8", "12", "16", "24", "32", "48", "64"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((*ASK, "--budgets", "13"), "--budgets: found 13, expected 0 to 12, the most tokens that a reply may have"),
        ((*ASK, "--at_least", "0"), "--at_least: found 0, expected 1 to 12"),
        ((*ASK, "--answer_tokens", "0"), "--answer_tokens: found 0, expected 1 or more"),
        ((*ASK, "--at_least", "2", "--go_on", " "), "--go_on: found an empty text"),
        ((*ASK, "--reward_funcs", "length"), "--reward_funcs: --suite think judges by the verifier alone"),
        ((*ASK, "--suite", "math", "--budgets", "4"), "--budgets: works with --suite think, found --suite math"),
        (("--budgets", "4"), "--budgets: works with --suite think; add that"),
        (("--suite", "think"), "--data: not given, and --suite think needs it: --data gsm8k"),
    ],
)
def test_what_cannot_be_asked_is_said(folder, flags, words):
    with pytest.raises(UserError, match=re.escape(words)):
        command(["eval", str(folder), *flags])


def test_a_line_break_is_typed_as_in_a_shell():
    words = dict.fromkeys(("at_once", "in_steps", "go_on"), "x") | {"answer": "\\n\\nSo"}
    others = dict.fromkeys(Settings.__dataclass_fields__, None)
    assert Settings(**{**others, **words}).words.answer == "\n\nSo"
