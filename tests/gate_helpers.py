"""The gate as a stage calls it, for the tests: encode, judge, refuse; and how a refusal is checked."""

from types import SimpleNamespace

import pytest

from posttrain import gate
from posttrain.conditions import CONDITIONS
from posttrain.data import tiny
from posttrain.errors import UserError
from posttrain.evals import ReplyConfig
from posttrain.ranking_rows import encode_rankings
from posttrain.rl.batches import gated_prompts
from posttrain.rl.config import RLConfig
from posttrain.sft_rows import gated_rows

ROWS = list(tiny.rows("conversations", "train", 40, 0))
SFT = SimpleNamespace(max_length=256, max_truncated=0.05, packing=True, too_long="cut")


def user(text):
    return {"role": "user", "content": text}


def says(text, **more):
    return {"role": "assistant", "content": text, **more}


class Run:
    """What the gate needs of a stage."""

    def __init__(self, *allow, parents=None):
        self.config, self.parents, self.notes, self.gate = {"allow": list(allow)}, parents or {}, [], None

    def note(self, text):
        self.notes.append(text)


def sft(tokenizer, model, rows=ROWS, run=None, **keys):
    config = SimpleNamespace(**{**vars(SFT), **keys})
    return gated_rows(run or Run(), tokenizer, model, rows, config)


def refused_and_allowed(name, words, act):
    """`act(run)` is refused for `name` alone with these words, and passes, recorded, once it is allowed."""
    with pytest.raises(UserError) as caught:
        act(Run())
    said = str(caught.value)
    assert said.startswith(f"the gate refuses to train. {name}: ")
    assert said.endswith(f"{CONDITIONS[name][1]}; or train nevertheless with --allow {name}"), said
    assert [other for other in CONDITIONS if f"{other}: " in said] == [name], said
    for word in words:
        assert word in said, (word, said)
    wrong = next(other for other in CONDITIONS if other != name)
    with pytest.raises(UserError, match=f"--allow {name}"):
        act(Run(wrong))
    run = Run(name)
    act(run)
    found = run.gate["allowed"]
    assert list(found) == [name] and name in run.gate["checked"] and found[name] in said
    assert run.notes[-1] == f"allowed: {name}: {found[name]}"


def rl(tokenizer, model, rows, run, **keys):
    replies = ReplyConfig(eval_max_tokens=16)
    return gated_prompts(run, model, tokenizer, rows, rows, RLConfig(**keys), replies)


def reward(tokenizer, rows, run, max_length=256):
    rankings, _ = encode_rankings(tokenizer, rows, max_length)
    gate.require(run, gate.reward_checks(tokenizer, rows, rankings, run.parents))


def own_tokens(tokenizer, messages, **more):
    """A row as `apply_chat_template` makes it: what many scripts map over their data."""
    found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **more)
    return {"input_ids": found["input_ids"], "assistant_masks": found["assistant_masks"]}


def failure(act) -> str:
    try:
        act()
    except UserError as error:
        return str(error)
    return ""


def opens_a_thought(template: str) -> str:
    """As DeepSeek R1's and its children's templates: the generation prompt writes <think>, training does not."""
    ours, theirs = "<|im_start|>assistant<|im_sep|>' -}}", "<|im_start|>assistant<|im_sep|><think>' -}}"
    assert template.count(ours) == 1
    return template.replace(ours, theirs)
