"""Replies measured with tools: eval_tools in place of training's, prefixes that open a call, what is counted, logged.

Run: pytest tests/test_eval_tools.py
"""

import pytest
import torch
from test_tool_rollouts import CALL, Says, spelled, tool_tokenizer

from posttrain.errors import UserError
from posttrain.evals import ReplyConfig, judge, measure_replies, prompt_ids, sample_replies
from posttrain.rl.config import RLConfig
from posttrain.rl.metrics import experience_numbers
from posttrain.rl.tools import ToolEngine
from posttrain.rl.types import Completion, Experience, Rollouts
from posttrain.tools import load_tools

ROWS = [{"prompt": [{"role": "user", "content": f"{n}+1?"}], "answer": str(n + 1)} for n in range(2)]
STOPS = (tool_tokenizer().eos_token_id,)


def replies(**keys) -> ReplyConfig:
    keys = {"eval_num_generations": 1, "eval_max_tokens": 400, "eval_reward_funcs": [], **keys}
    return ReplyConfig(**keys)


def test_eval_tools_are_told_and_called_whatever_training_has():
    config = replies(eval_tools=["calculator"])
    rows = config.told([{**row, "tools": ["old"]} for row in ROWS])
    assert [[tool["function"]["name"] for tool in row["tools"]] for row in rows] == [["calculator"]] * 2
    assert '"name": "calculator"' in tool_tokenizer().decode(prompt_ids(tool_tokenizer(), rows[0]))
    found = sample_replies(Says(CALL % "1+1", "2"), tool_tokenizer(), rows, config, STOPS)
    assert [one.calls for one in found.completions] == [1, 1]
    metrics = judge(found, tool_tokenizer(), config)
    assert metrics["replies that call"]["value"] == metrics["calls"]["value"] == 1.0
    assert metrics["replies with a failed call"]["value"] == 0.0


def test_no_tools_takes_trainings_away_and_unset_keeps_them():
    def trained() -> ToolEngine:
        return ToolEngine(Says(CALL % "1+1", "2"), load_tools(["calculator"]), tool_tokenizer())

    none = replies(eval_tools=[])
    assert none.told([{**ROWS[0], "tools": ["old"]}]) == ROWS[:1] and none.told(ROWS) == ROWS
    found = sample_replies(trained(), tool_tokenizer(), ROWS, none, STOPS)
    assert [(one.calls, one.mask) for one in found.completions] == [(None, None)] * 2
    assert "calls" not in judge(found, tool_tokenizer(), none)
    kept = sample_replies(trained(), tool_tokenizer(), replies().told(ROWS), replies(), STOPS)
    assert [one.calls for one in kept.completions] == [1, 1]


def test_a_prefix_that_opens_a_call_is_answered():
    prefix, rest = "<tool_call>", (CALL % "3*3").removeprefix("<tool_call>")
    config = replies(eval_tools=["calculator"], eval_prefixes={"tool": prefix})
    engine = Says("no", rest, "9")
    metrics, _ = measure_replies(engine, tool_tokenizer(), config.told(ROWS), config, STOPS)
    assert metrics["calls"]["value"] == 0.0 and metrics["calls, tool"]["value"] == 1.0
    found = sample_replies(Says(rest, "9"), tool_tokenizer(), config.told(ROWS), config, STOPS, prefix)
    for one in found.completions:
        assert len(one.mask) == len(one.ids) == len(one.logps)
        assert one.ids[: len(spelled(prefix))] == spelled(prefix) and one.mask[0] == 1
        said = tool_tokenizer().decode([id for id, own in zip(one.ids, one.mask, strict=True) if not own])
        assert "\n9\n" in said


def test_wrong_settings_name_the_key():
    for keys, message in [
        ({"eval_tool_options": {"search": {}}}, "eval_tool_options: 'search' is not among the tools .none."),
        ({"eval_tools": ["search"]}, "eval_tool_options: search: folder, url: found neither"),
        ({"max_tool_calls": 0}, "max_tool_calls: found 0"),
        ({"tool_timeout": 0.0}, "tool_timeout: found 0"),
    ]:
        with pytest.raises(UserError, match=message):
            replies(**keys)
    with pytest.raises(UserError, match="tool_options: calculator takes no options"):
        RLConfig(tools=["calculator"], tool_options={"calculator": {"x": 1}})


def test_a_step_logs_calls_their_share_and_failures():
    """Three completions: two calls of which one failed, one call, none."""
    calls = [(2, 1), (1, 0), (0, 0)]
    completions = [Completion([1, 2], [0.0, 0.0], "stop", [1, int(not n)], n, failed) for n, failed in calls]
    rollouts = Rollouts([{}] * 3, [[0]] * 3, completions, 3)
    pieces = [torch.zeros(sum(one.mask)) for one in completions]
    experience = Experience(rollouts, torch.tensor([1.0, 0.0, 0.5]), {}, pieces, advantages=pieces)
    numbers = experience_numbers(experience, tools=True)
    assert numbers["tool_calls"] == 1.0 and numbers["tool_share"] == pytest.approx(2 / 3)
    assert numbers["tool_calls_failed"] == pytest.approx(1 / 3) and numbers["tool_tokens"] == pytest.approx(2 / 3)
