"""`posttrain eval --suite`: replies recited from known answers, what is refused, GSM8K's own solutions.

Run: pytest tests/test_suites.py
"""

import json
import os
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
from scipy import stats

from posttrain import suite_chat, suites
from posttrain.bestof import Study
from posttrain.chat import stop_ids
from posttrain.cli import command
from posttrain.data.math import gsm8k, gsm8k_conversations
from posttrain.errors import UserError
from posttrain.models import save_pair
from posttrain.rl.engine import Sampling
from posttrain.rl.types import Completion, Rollouts
from posttrain.suite_replies import Found, Settings, answer_of, majority, measure, powers

ANSWERS = ["the answer is 4", "\\boxed{5}", "so #### 4", "I do not know"]


class Reciter:
    """An engine that says by heart: `replies[prompt]`, at temperature 0 the first of them."""

    name, concurrent = "reciter", False

    def __init__(self, tokenizer, replies: list[list[str]]):
        self.tokenizer, self.replies, self.stop = tokenizer, replies, stop_ids(tokenizer)[0]

    def generate(self, prompts, sampling: Sampling, seed: int) -> list[Completion]:
        said = [texts[: sampling.n] for texts in self.replies[: len(prompts)]]
        return [self.completion(text) for texts in said for text in texts]

    def completion(self, text: str) -> Completion:
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return Completion([*ids, self.stop], [0.0] * (len(ids) + 1), "stop")


def recited(model, tokenizer, rows, replies, tmp_path, suite="math", **changes) -> Found:
    subject = SimpleNamespace(
        model=model, tokenizer=tokenizer, study=Study(tmp_path, {"seed": 0}), options=Namespace(model="m"), longest=0,
        engine=Reciter(tokenizer, replies),
    )  # fmt: skip
    return measure(subject, rows, Settings(suite, len(replies[0]), 64, 1, **changes))


def problem(answer: str) -> dict:
    return {"prompt": [{"role": "user", "content": "2+2?"}], "answer": answer}


def test_pass_at_k_majority_and_greedy_of_known_replies(model, tokenizer, tmp_path):
    """Two, one and none of four right: 1 - C(n-c, k) / C(n, k) by hand."""
    right, wrong = "The answer is 4.", "The answer is 5."
    replies = [[right, wrong, right, "?"], [wrong, wrong, right, "?"], [wrong, "?", "?", "?"]]
    found = recited(model, tokenizer, [problem("4")] * 3, replies, tmp_path)
    values = {name: figure["value"] for name, figure in found.metrics.items()}
    assert values["pass@1"] == pytest.approx((2 / 4 + 1 / 4 + 0) / 3)
    assert values["pass@2"] == pytest.approx(((1 - 1 / 6) + (1 - 3 / 6) + 0) / 3)
    assert values["pass@4"] == pytest.approx(2 / 3)
    assert values["maj@4"] == pytest.approx(1 / 3)  # 4, 4 against 5; 5, 5 against 4; 5 alone
    assert values["pass@1, greedy"] == pytest.approx(1 / 3)  # of what stands first
    assert values["replies with a marked answer"] == pytest.approx((3 + 3 + 1) / 12)
    assert values["replies that end"] == 1.0
    by_problem = [0.5, 0.25, 0.0]
    low, high = stats.norm.interval(0.95, numpy.mean(by_problem), stats.sem(by_problem))
    assert found.metrics["pass@1"]["high"] == pytest.approx(high, rel=1e-4)
    assert found.metrics["pass@1"]["low"] == pytest.approx(max(0.0, low), abs=1e-5)
    wrong_ones = [sample for sample in found.samples if sample["why"] == "one of the first wrong ones"]
    assert [(sample["row"], sample["reply"]) for sample in wrong_ones] == [(0, wrong), (1, wrong), (2, wrong)]


def test_equal_answers_share_a_vote():
    assert [answer_of(text) for text in ANSWERS] == ["4", "5", "4", None]
    assert answer_of("The answer is 4.0") == answer_of("\\boxed{4}") != answer_of("#### 4%")
    assert answer_of("\\boxed{x + 1}") == answer_of("\\boxed{x+1}") == "x+1"
    found = Found(texts=["no", "no", "\\boxed{2}", "\\boxed{1}"])
    assert majority(found, [[0.0, 0.0, 1.0, 0.0]], 4) == [1.0]  # of equal votes the first given
    assert powers(8) == [1, 2, 4, 8] and powers(6) == [1, 2, 4, 6] and powers(1) == [1]


def test_solutions_of_gsm8k_are_all_right(model, tokenizer, tmp_path):
    """A model that says the data set's own worked solutions solves every problem."""
    shared = os.environ.get("POSTTRAIN_REAL_DATA")
    if not shared:
        pytest.skip("POSTTRAIN_REAL_DATA names no folder with gsm8k/train.jsonl")
    raw = [json.loads(line) for line in (Path(shared) / "data/gsm8k/train.jsonl").open()][:300]
    rows = [{**row, "prompt": problem("")["prompt"]} for row in gsm8k(raw)]
    replies = [[row["messages"][1]["content"]] for row in gsm8k_conversations(raw)]
    found = recited(model, tokenizer, rows, replies, tmp_path)
    assert found.metrics["pass@1"]["value"] == 1.0 and found.metrics["pass@1"]["n"] == 300
    spoilt = [[text[0] + "9"] for text in replies]  # another last digit
    assert recited(model, tokenizer, rows, spoilt, tmp_path).metrics["pass@1"]["value"] == 0.0


def test_what_is_said_of_chat_replies(tokenizer):
    control = tokenizer.convert_tokens_to_ids("<|im_start|>")
    stop = stop_ids(tokenizer)[-1]
    texts = ["", "I can\u2019t help with that.", "Of course!", "one two three four five six seven eight " * 4]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    ids[2] = [*ids[2], control, *ids[2]]
    prompt = [{"role": "user", "content": "Was ist das? Bitte erkläre es mir so genau wie möglich."}]
    rows = [{"prompt": prompt}] * 4
    replies = Rollouts(rows, [[1]] * 4, [Completion([*one, stop], [], "stop") for one in ids], 1)
    found = suite_chat.judge(replies, texts, tokenizer)
    assert found["empty replies"] == [1.0, 0.0, 0.0, 0.0]
    assert found["refusals"] == [0.0, 1.0, 0.0, 0.0]
    assert found["control tokens in the text"] == [0.0, 0.0, 1.0, 0.0]
    assert found["tokens repeated"][3] > 0.5 > found["tokens repeated"][1] == 0.0
    assert found["in the prompt's language"][3] == 0.0  # English, asked in German
    assert not suite_chat.refuses("Sure. " * 40 + "I cannot say more.")


def test_a_paired_change_is_that_of_the_prompts_both_were_asked():
    rng = numpy.random.default_rng(0)
    old, new = rng.random(40), rng.random(40)
    figure = {"pass@1": {"unit": "%"}}
    before = Found(metrics=figure, by_row={"pass@1": list(old)}, rows=list(range(40)))
    after = Found(metrics=figure, by_row={"pass@1": [*new[10:], None]}, rows=list(range(10, 41)))
    change = suites.paired(before, after, "sft")["pass@1"]
    gaps = 100 * (new - old)[10:]
    low, high = stats.norm.interval(0.95, gaps.mean(), stats.sem(gaps))
    assert (change["value"], change["low"], change["high"]) == pytest.approx((gaps.mean(), low, high), rel=1e-3)
    assert (change["n"], change["unit"], change["against"]) == (30, "points", "sft")
    same = suites.difference([0.0, 0.0], "points")
    assert same["low"] == same["high"] == 0.0


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory, model, tokenizer):
    folder = tmp_path_factory.mktemp("suites") / "chat"
    save_pair(model, tokenizer, folder)
    return str(folder)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--suite", "matth"), "--suite: found 'matth', expected one of math, .*; did you mean 'math'"),
        (("--suite", "math"), "--data: not given, and --suite math needs it: --data gsm8k, or"),
        (("--suite", "identity"), "--identity: not given"),
        (("--suite", "math", "--data", "tiny", "--reward", "x"), "--reward: works with --suite chat"),
        (("--suite", "chat", "--data", "tiny", "--against", "x"), "--against x: needs one who decides"),
        (("--suite", "chat", "--data", "tiny", "--judge", "http://x/v1"), "--judge: needs --judge_model"),
        (("--suite", "math", "--data", "tiny", "--temperature", "0"), "add --num_generations 1"),
        (("--suite", "code", "--data", "tiny", "--data_config", "problems"), "row 0 has no tests .*humaneval"),
        (("--suite", "chat", "--data", "tiny", "--reward", "SELF"), "is no reward model .LlamaForCausalLM"),
    ],
)
def test_what_cannot_be_measured_is_refused(chat_folder, flags, words):
    flags = [chat_folder if flag == "SELF" else flag for flag in flags]
    with pytest.raises(UserError, match=words):
        command(["eval", chat_folder, *flags, "--use_vllm", "false"])


def test_a_model_that_is_not_named_and_files_that_are_no_evaluation(tmp_path):
    with pytest.raises(UserError, match="MODEL: not given"):
        command(["eval", "--suite", "math"])
    with pytest.raises(UserError, match="--again: no file"):
        command(["eval", "--again", "none.json"])
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match="is no stored evaluation: it has no suite, model"):
        command(["eval", "--again", str(tmp_path / "x.json")])
