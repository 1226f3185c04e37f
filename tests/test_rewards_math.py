r"""The maths reward: replies and the scores they must get, hostile replies, and every GSM8K solution."""

import json
import os
import re
import threading
from pathlib import Path

import pytest

from posttrain.errors import UserError
from posttrain.rewards import REWARDS, load_reward
from posttrain.rewards.math import correct


def score(gold, completion) -> float | None:
    (value,) = correct(["?"], [completion], [[1]], answer=[gold], source=["a column the reward does not know"])
    return value


RIGHT = [
    # where the answer stands
    ("72", r"So it is \boxed{72}."),
    ("72", "48+24 = 72\n#### 72"),
    ("72", "The answer is 72."),
    ("72", "The answer to 3*24 is 72"),
    ("72", "**Answer:** **72**"),
    ("72", "The answer is:\n\n$$72$$"),
    ("72", "It is 71, no, 72"),
    ("72", r"\boxed{5}, or rather \boxed{72}"),
    ("72", r"\boxed{72}. I hope that this answer is right."),
    ("72", "The answer is 72. I hope that this answer is right."),
    ("72", "24+48=72. Tell me whether my answer is right."),
    ("72", "the answer is 36+36 = 72 clips in 2 months"),
    ("72", "The answer is 72 dollars in 2 months"),
    ("72", "The answer is 72, which is 3*24"),
    ("72", "5, or rather 72"),
    # how numbers are written
    ("72", "#### 72.0"),
    ("1080", "#### 1,080"),
    ("1080", r"\boxed{1{,}080}"),
    ("1,080", "1080"),
    (72, "72"),
    ("72", r"\boxed{\$72}"),
    ("72", r"\boxed{x = 72}"),
    ("72", r"\boxed{72\text{ apples}}"),
    ("72", r"\boxed{72^\circ}"),
    ("-5", "The answer is −5"),
    ("-5", "the answer is -$5"),
    ("5", "10-5"),
    ("0.5", "The answer is .5"),
    ("1000000", "1e6"),
    ("1/2", r"\boxed{\frac{1}{2}}"),
    ("1/2", "0.5"),
    ("1/2", r"\boxed{50\%}"),
    (r"\frac{1}{2}", "The answer is 2/4."),
    ("1/3", "0.333333"),
    ("5/2", r"\boxed{2\frac{1}{2}}"),
    ("72", "the answer is 72%"),
    ("0.72", r"\boxed{72\%}"),
    ("72%", "0.72"),
    # formulas, sets, words
    (r"\frac{\sqrt{3}}{2}", r"\boxed{\sqrt{3}/2}"),
    (r"2\pi", r"\boxed{2 \cdot \pi}"),
    ("(x+1)^2", r"\boxed{x^2+2x+1}"),
    (r"\{1, 2\}", r"\boxed{\{2, 1\}}"),
    (r"\{\frac{1}{2}, 2\}", r"\boxed{\{2, 0.5\}}"),
    (r"\left(1, \frac{3}{2}\right)", r"\boxed{(1, 1.5)}"),
    (r"x^{10}+x^5+x^2+1", r"The answer is $1+x^2+x^{5}+x^{10}$."),
    (r"\frac{\sqrt{3}}{2}", r"\boxed{\sin(60^\circ) = \frac{\sqrt{3}}{2}}"),
    (r"5\times 10^{-20}", r"\boxed{5 \cdot 10^{-20}}"),
    (r"[0,\infty)", r"\boxed{x \in [0, \infty)}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\boxed{\begin{pmatrix}1 & 2\\ 3 & \frac{8}{2}\end{pmatrix}}"),
    ("A", r"\boxed{\text{A}}"),
    ("Paris", "The answer is Paris."),
    (r"\boxed{72}", "72"),
]
WRONG = [
    ("72", ""),
    ("72", "172"),
    ("72", "7 2"),
    ("72", "The answer is -72"),
    ("72", r"\boxed{72} no, \boxed{5}"),
    ("-5", "10-5"),
    ("1/3", "0.33"),
    ("0.0000001", "0"),  # a tolerance must not swallow a small gold
    ("1234567.5", "1234567.4"),
    ("72%", "0.72%"),
    # the question said back, not worked out
    ("72", "the answer is 36+36"),
    ("72", r"\boxed{3*24}"),
    ("72", r"\boxed{144/2}"),
    (72.0, r"\boxed{144/2}"),
    ("4", r"\boxed{2^2}"),
    ("4", r"\boxed{\sqrt{16}}"),
    ("2", r"\boxed{2\pi}"),
    ("2", r"\boxed{2x}"),
    # many answers at once
    ("72", " ".join(map(str, range(100)))),
    ("72", "the answer is 1 or 2 or 72"),
    ("72", r"\boxed{72, 73}"),
    ("72", r"\boxed{1, 2, 72}"),
    ("72", r"\boxed{72 or 73}"),
    ("72", "72 or 73"),
    ("73", "72 or 73"),
    ("72", "The answer is 72 or 73"),
    ("72", "The answer is 72 or maybe 73."),
    ("72", "The answer is either 72 or 73."),
    ("72", "The answer is 72, 73, 74"),
    ("72", "The answer is 72 and 73"),
    ("72", "The answer is 72; 73"),
    ("72", "The answer is 72 70 71"),
    ("72", "The answer is 72 to 80"),
    ("72", "The answer is between 72 and 80"),
    ("72", "The answer is 72 ± 5"),
    ("72", "The answer is not 72"),
    ("72", "#### 72 73"),
    ("72", "#### 72, 73"),
    ("72", "#### 72 or 73"),
    (r"\sqrt{2}", r"\boxed{\sqrt{2} or \sqrt{3}}"),
    ("A", "A or B"),
    ("A", r"\boxed{A, B}"),
    ("72", "The answer is 72. " + " ".join(f"The answer is {n}." for n in range(99))),
    (r"\{1, 2\}", r"\boxed{\{1, 2, 3\}}"),
    ("(1, 2)", r"\boxed{(2, 1)}"),
    (r"\frac{\sqrt{3}}{2}", r"\boxed{\sqrt{3}/3}"),
    ("x^2+1", r"\boxed{x^2+1, x^2+2}"),
    ("x_{12}+1", r"\boxed{1+x_{21}}"),
    (r"5\times 10^{-20}", r"\boxed{0}"),
    (r"\sqrt{x^2}", r"\boxed{x}"),
    ("78x", r"\boxed{1 2 3 72 x}"),
    ("Paris", "The answer is London."),
    # cut off in its answer
    ("72", r"\boxed{72"),
    ("72", "The answer is"),
    # no number at all, or none that may be one
    ("72", "NaN"),
    ("72", r"\boxed{nan}"),
    ("72", r"\boxed{\infty}"),
    ("72", "5/0"),
    ("72", "٧٢"),
    ("72", "７２"),
    ("72", "#### ⁷²"),
]


@pytest.mark.parametrize("gold, completion", RIGHT)
def test_right(gold, completion):
    assert score(gold, completion) == 1.0


@pytest.mark.parametrize("gold, completion", WRONG)
def test_wrong(gold, completion):
    assert score(gold, completion) == 0.0


HOSTILE = [
    "10^9^9",
    "10^{9^{9}}",
    "(((9^{9})^{99})^{99})^{99}",
    "9^{99^{99}}",
    "1e999999999",
    "9" * 100_000,
    "9" * 100_000 + "!",
    "1/" + "9" * 100_000,
    "1," * 50_000,
    " " * 100_000 + "1",
    "(" * 50_000,
    "{" * 50_000,
    r"\frac" * 20_000,
    r"\frac{1}{" * 10_000,
    r"\sqrt{" * 10_000,
    r"\log(" * 30 + "x" + ")" * 30,
    "answer to " * 10_000,
    r"\sum_{n=1}^{999999999} n",
    r"\int_0^1 x^x dx",
    r"\prod_{k=1}^{99999} k",
    r"e^{e^{e^{e^{99}}}}",
    r"\exp(\exp(\exp(99)))",
    r"__import__('os').getcwd()",
    "factorial(999999)",
    "\x00\x01\ud800",
    "999999999999",  # simplify(log(x+y)*z - 999999999999) is what hangs math-verify
    "(99)^{20}",
    r"\frac{1}{" * 3000 + "2" + "}" * 3000,
    "٣" * 50_000,
    "nan " * 20_000,
]


@pytest.mark.parametrize("gold", ["72", r"\log(x+y)z", r"e^{x}\sin(x)+\cos(2x)", r"[0,\infty)"])
@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_replies_gain_nothing_and_come_back(gold, hostile):
    for completion in (hostile, rf"\boxed{{{hostile}}}", f"The answer is {hostile}", f"#### {hostile}"):
        assert score(gold, completion) == 0.0


def test_layouts():
    reply = [{"role": "assistant", "content": "#### 72"}]
    call = [{"role": "assistant", "content": None}]
    golds = ["72", "72", "72", None, "7"]
    assert correct(None, [reply, call, [], reply, reply], answer=golds) == [1.0, 0.0, 0.0, None, 0.0]
    assert correct([], [], answer=[]) == []


def test_formulas_off_the_main_thread():
    """math-verify's own time-outs use signals, and off the main thread every answer is wrong to it."""
    scores = []
    thread = threading.Thread(target=lambda: scores.append(score("(a+1)^2", r"\boxed{a^2+2a+1}")))
    thread.start()
    thread.join()
    assert scores == [1.0]


@pytest.mark.parametrize("gold", ["", "  ", float("nan")])
def test_a_gold_nobody_can_match_is_refused(gold):
    with pytest.raises(UserError, match="row 0"):
        score(gold, "72")


def test_load_reward(tmp_path, monkeypatch):
    assert load_reward("correct") is REWARDS["correct"] is correct
    assert load_reward("posttrain.rewards.math.correct") is correct
    (tmp_path / "own_rewards.py").write_text("LIMIT = 3\ndef short(prompts, completions, **_):\n    return [1.0]\n")
    (tmp_path / "broken_rewards.py").write_text("import no_such_library\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in __import__("sys").path if path])
    assert load_reward("own_rewards.short")(["?"], ["!"]) == [1.0]
    for name, error in {
        "corect": "did you mean 'correct'",
        "zzz": "known: answered, call_cost, code, correct, format",
        "own_reward.short": "no module 'own_reward'",
        "posttrain.rewardz.short": "no module 'posttrain.rewardz'",
        "own_rewards.shirt": "did you mean 'short'",
        "own_rewards.LIMIT": "its type is int, expected a function",
    }.items():
        with pytest.raises(UserError, match=re.escape(error)):
            load_reward(name)
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):  # a bug in the user's file: shown as it is
        load_reward("broken_rewards.short")


def test_every_real_gsm8k_solution_is_right_and_its_neighbour_wrong():
    folder = os.environ.get("POSTTRAIN_REAL_DATA")
    if not folder:
        pytest.skip("POSTTRAIN_REAL_DATA is unset: no GSM8K to grade")
    rows = [json.loads(line) for line in (Path(folder) / "data/gsm8k/train.jsonl").open(encoding="utf-8")]
    solutions = [row["answer"] for row in rows]
    golds = [solution.split("#### ")[1].replace(",", "") for solution in solutions]
    wrong = [str(int(gold) + 1) for gold in golds]
    assert len(rows) == 7473
    for dress in ("{}", r"... \boxed{{{}}}", "The answer is ${}.", "So {}"):
        replies = solutions if dress == "{}" else [dress.format(f"{int(gold):,}") for gold in golds]
        assert correct(None, replies, answer=golds) == [1.0] * 7473
        assert correct(None, replies, answer=wrong) == [0.0] * 7473
