"""The doctor: each remark provoked, by a real short training run where seconds are enough, else by a history.

Run: pytest tests/test_doctor.py
"""

import json
import random
import re
import subprocess
import sys
from copy import deepcopy
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from rl_helpers import ROOT, frozen, make_trainer, settings, tiny_llama, tiny_scorer, tiny_tokenizer
from test_report import Page, assert_inert, put

from posttrain import yaml_file
from posttrain.doctor import QUIET, Doctor, Remark, diagnose, doctor_of, heard, remarks, tell
from posttrain.doctor_checks import CHECKS, NORMAL
from posttrain.errors import UserError
from posttrain.report import write_report
from posttrain.rl.config import PPOConfig
from posttrain.rl.rollout import HFEngine
from posttrain.training import OptimConfig

RUN = {"num_prompts": 8, "num_generations": 8, "max_completion_length": 16, "max_steps": 6}


pytestmark = pytest.mark.usefixtures("restored_signals")


@cache
def talker():
    """A llama that has learned to reply with one to six letters of abcd and to end its turn."""
    from posttrain.chat import encode_chat

    tokenizer, draw = tiny_tokenizer(), random.Random(0)
    model = tiny_llama(initializer_range=0.05)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        chats = []
        for _ in range(16):
            reply = "".join(draw.choice("abcd") for _ in range(draw.randint(1, 6)))
            talk = [{"role": "user", "content": draw.choice("abcdefgh")}, {"role": "assistant", "content": reply}]
            chats.append(encode_chat(tokenizer, talk))
        width = max(len(chat.input_ids) for chat in chats)
        ids = torch.tensor([chat.input_ids + [0] * (width - len(chat.input_ids)) for chat in chats])
        mask = torch.tensor([chat.assistant_mask + [0] * (width - len(chat.assistant_mask)) for chat in chats])
        loss = model(input_ids=ids, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def share_of_a(prompts, completions, completion_ids, **columns):
    return [text.count("a") / max(1, len(text)) for text in completions]


def share_of_b(prompts, completions, completion_ids, **columns):
    return [text.count("b") / max(1, len(text)) for text in completions]


def constant(value):
    return lambda prompts, **columns: [value] * len(prompts)


def length(prompts, completions, completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


def trained(folder, rewards=None, *, rate=1e-3, policy=None, schedule="constant", beta=0.0, ppo=None, **keys):
    """The doctor's remarks on a real short run, and its log."""
    policy = deepcopy(talker()) if policy is None else policy
    rewards = rewards or [("share of a", share_of_a, 1.0)]
    optim = OptimConfig(learning_rate=rate, warmup_steps=0, lr_scheduler_type=schedule)
    parts = {} if not beta else {"reference": frozen(policy)}
    if ppo is not None:
        critic = tiny_scorer(1, initializer_range=0.02)
        parts |= {"ppo": ppo, "critic": critic, "reference": frozen(policy)}
    engine = keys.pop("engine", HFEngine)(policy, tiny_tokenizer().pad_token_id)
    config = settings(**{**RUN, "beta": beta, **keys})
    trainer = make_trainer(folder, policy, rewards, config, optim=optim, engine=engine, **parts)
    trainer.train()
    return diagnose(folder)


def keys(found: list[Remark]) -> set[str]:
    return {remark.key for remark in found}


def the(found: list[Remark], key: str) -> Remark:
    return next(remark for remark in found if remark.key == key)


# ---- real runs ------------------------------------------------------------------------------------------------------


def warnings(found: list[Remark]) -> list[str]:
    """Without what depends on this machine's speed."""
    return [str(each) for each in found if not each.normal and each.key not in ("generation_slow", "slower")]


def test_a_sound_run_gives_no_warning(tmp_path):
    assert warnings(trained(tmp_path / "out", max_steps=12, rate=3e-4)) == []


def test_equal_answers(tmp_path):
    found = trained(tmp_path / "out", [("never", constant(0.0), 1.0)], max_steps=4)
    said = the(found, "zero_signal")
    assert said.step == 1 and "all 8 answers of 100% of the groups score the same" in said.text
    assert "take easier problems" in said.text
    assert "never: the same for every answer" in the(found, "reward_constant").text


def test_nothing_left_to_learn(tmp_path):
    found = trained(tmp_path / "out", [("always", constant(1.0), 1.0)], max_steps=4, reward_funcs=["always"])
    assert "nothing left to learn" in the(found, "reward_saturated").text and "reward_constant" not in keys(found)


def test_cut_replies(tmp_path):
    found = trained(tmp_path / "out", max_completion_length=3, max_steps=3)
    assert "of completions hit the limit of 3 tokens" in the(found, "cut_share").text


def test_replies_that_never_end(tmp_path):
    found = trained(tmp_path / "out", policy=tiny_llama(initializer_range=0.02), max_completion_length=3, max_steps=3)
    assert re.search("replies never end: (9[5-9]|100)% hit the limit of 3 tokens", the(found, "end_unlearned").text)


def test_an_end_that_is_unlearned_and_a_reward_that_likes_length(tmp_path):
    found = trained(tmp_path / "out", [("length", length, 1.0)], max_steps=20)
    assert "rose from 0% to 9" in the(found, "end_unlearned").text
    assert "tokens as the reward rose" in the(found, "length_hacked").text


def test_loss_zero_in_the_first_step_is_normal(tmp_path):
    said = the(trained(tmp_path / "out", loss_type="grpo"), "loss_zero")
    assert said.normal and said.step == 1 and "loss 0.000 is normal in the first step on policy" in said.text
    first = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[0])
    assert abs(first["loss"]) < 5e-4 and first["grad_norm"] > 0


def test_a_learning_rate_too_high(tmp_path):
    found = trained(tmp_path / "out", rate=2e-2, beta=1e-6, num_iterations=4, max_steps=12)
    assert {"entropy_fell", "kl_grew"} <= keys(found), found
    assert "entropy fell by half in 10 steps" in the(found, "entropy_fell").text


def test_updates_too_large_for_their_batch(tmp_path):
    found = trained(tmp_path / "out", [("random", lambda prompts, **_: torch.rand(len(prompts)).tolist(), 1.0)],
                    num_iterations=8, epsilon=0.01, max_steps=4)  # fmt: skip
    assert "8 updates a batch" in the(found, "clipped").text


class OffByAConstant(HFEngine):
    """Says less likely than it was of every token."""

    def generate(self, prompts, sampling, seed):
        found = super().generate(prompts, sampling, seed)
        for completion in found:
            completion.logps = [logp - 0.3 for logp in completion.logps]
        return found


def test_log_probabilities_that_disagree(tmp_path):
    found = trained(tmp_path / "out", beta=1e-6, engine=OffByAConstant, max_mismatch=2.0, max_steps=3)
    assert "the log-probabilities disagree" in the(found, "kl_negative").text
    assert "is 1.350 (the run stops at 2)" in the(found, "mismatch").text


def test_a_proxy_that_is_over_optimized(tmp_path):
    rewards = [("proxy", share_of_a, 1.0), ("judge", share_of_b, 0.0)]
    found = trained(tmp_path / "out", rewards, max_steps=20, rate=2e-3)
    said = the(found, "over_optimized").text
    assert "reward/judge falls" in said


def test_a_batch_that_explodes(tmp_path):
    calls = []

    def sometimes_huge(prompts, completions, completion_ids, **columns):
        calls.append(1)
        return [(1000 if len(calls) == 10 else 1) * v for v in share_of_a(prompts, completions, completion_ids)]

    found = trained(tmp_path / "out", [("odd", sometimes_huge, 1.0)], max_steps=10, rate=1e-4, scale_rewards="none")
    assert the(found, "gradient_spike").step == 10


def test_a_critic_that_has_seen_nothing_is_normal(tmp_path):
    found = trained(tmp_path / "out", max_steps=2, beta=1e-6, ppo=PPOConfig(reward_model_path="none"))
    assert the(found, "critic_young").normal


def test_a_reward_function_that_does_not_apply(tmp_path):
    rewards = [("share of a", share_of_a, 1.0), ("lost", constant(None), 1.0)]
    assert "lost (100%)" in the(trained(tmp_path / "out", rewards, max_steps=3), "reward_none").text


# ---- histories ------------------------------------------------------------------------------------------------------


def history(num: int, **series) -> list[dict]:
    """`num` lines; a value is a number or a function of the step, from 1."""
    return [
        {"step": step, **{key: value(step) if callable(value) else value for key, value in series.items()}}
        for step in range(1, num + 1)
    ]


SOUND = {
    "reward": lambda step: 0.4 + 0.01 * step, "reward_std": 0.4, "zero_signal_groups": 0.1, "cut_share": 0.01,
    "completion_length": lambda step: 40 + step / 2, "entropy": lambda step: 0.5 - 0.005 * step, "ratio": 1.0,
    "kl": lambda step: 0.05 * step, "clip_ratio": 0.02, "grad_norm": 0.5, "loss": 0.1, "mismatch": 1.001,
    "explained_variance": 0.5, "learning_rate": 1e-4, "share/generate": 0.5, "tokens_per_second": 900.0,
}  # fmt: skip
PROVOKED = {
    "sampled_groups": ({"sampled_groups": 170.0}, {"num_prompts": 48}, "draws 170 groups to find 48"),
    "reward_fell": (
        {"reward": lambda step: 0.2 + 0.03 * min(step, 20) - 0.06 * max(0, step - 20)}, {}, "fell from 0.77",
    ),
    "length_collapsed": ({"completion_length": lambda step: 100 * 0.9**step}, {}, "tokens: the reward may pay"),
    "entropy_rose": ({"entropy": lambda step: 0.3 if step < 22 else 0.3 + 0.2 * (step - 22)}, {}, "entropy rose"),
    "kl_noise": ({"kl": -0.02}, {}, "below 0 is noise"),
    "gradient_zero": ({"grad_norm": lambda step: 0.0 if step > 25 else 1.0}, {}, "the gradient is exactly 0"),
    "rate_zero": ({"learning_rate": lambda step: max(0.0, 25 - step)}, {"max_steps": 50}, "ended too early"),
    "critic_poor": (
        {"explained_variance": lambda step: 0.3 if step < 9 else -0.4}, {"critic_warmup_steps": 5}, "explains -0.40",
    ),
    "generation_slow": ({"share/generate": 0.87}, {}, "generation takes 87% of a step"),
    "slower": ({"tokens_per_second": lambda step: 900.0 if step < 25 else 400.0}, {}, "from 900 to 400"),
    "mismatch": ({"mismatch": lambda step: 1.001 + 0.001 * step}, {}, "crept up to"),
}  # fmt: skip
SUPERVISED = {
    "loss_spike": ({"loss": lambda step: 1.5 + 0.01 * (step % 3) if step < 30 else 4.0}, {}, "times the usual"),
    "loss_memorised": ({"loss": lambda step: 2.0 * 0.7**step}, {}, "known by heart"),
    "held_out_rises": (
        {"held_out_loss": lambda step: 2 - 0.1 * step if step < 25 else 0.1 * step - 2.9}, {}, "over-fitting",
    ),
    "pairs_guessed": ({"loss": 0.6931}, {"loss_type": "bradley_terry", "max_steps": 40}, "is ln 2"),
}  # fmt: skip


@pytest.mark.parametrize("key", PROVOKED)
def test_what_a_history_shows(key):
    changes, config, words = PROVOKED[key]
    sound = history(30, **SOUND)
    assert remarks(sound, {}) == [], "the history without the change is sound"
    found = heard(history(30, **{**SOUND, **changes}), config)
    assert keys(found) == {key} and words in found[0].text, found


@pytest.mark.parametrize("key", SUPERVISED)
def test_what_the_log_of_a_supervised_stage_shows(key):
    changes, config, words = SUPERVISED[key]
    sound = {"loss": lambda step: 2.0 - 0.01 * step, "grad_norm": 0.5, "learning_rate": 1e-4}
    assert heard(history(30, **sound), {}) == []
    found = heard(history(30, **{**sound, **changes}), config)
    assert keys(found) == {key} and words in found[0].text, found


def test_every_check_is_provoked_somewhere():
    text = (ROOT / "tests" / "test_doctor.py").read_text()
    assert [check.__name__ for check in (*CHECKS, *NORMAL) if f'"{check.__name__}"' not in text] == []


def test_a_remark_is_said_once_until_it_has_been_away():
    doctor = Doctor({})
    slow = [*[True] * 20, *[False] * (QUIET + 10), *[True] * 10]
    said = []
    for step, each in enumerate(slow, 1):
        line = {"step": step, "reward": 0.5, "share/generate": 0.9 if each else 0.1}
        said += [remark.step for remark in doctor.look(line)]
    assert len(said) == 2 and said[0] == 5 and said[1] > 20 + QUIET


@pytest.mark.parametrize("value", [float("nan"), None, "text", True])
def test_values_that_are_no_numbers_are_passed_over(value):
    for key in SOUND:
        assert heard(history(12, **{**SOUND, key: value}), {}) == [], key


# ---- offline --------------------------------------------------------------------------------------------------------


def write_stage(folder, lines, config):
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 31, "rew')
    (folder / "config.yaml").write_text(yaml_file.dump(config))


def test_a_folder_is_diagnosed_with_its_config(tmp_path):
    lines = history(30, **{**SOUND, "cut_share": 0.4})
    write_stage(tmp_path / "run" / "grpo", lines, {"max_completion_length": 80, "output_dir": "x"})
    write_stage(tmp_path / "run" / "ppo", history(30, **SOUND), {})
    done = subprocess.run(
        [sys.executable, "-m", "posttrain.doctor", tmp_path / "run"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("grpo: doctor, step 1: 40% of completions hit the limit of 80 tokens")
    assert second == "ppo: nothing to remark on" and tell(tmp_path / "run" / "ppo") == second


def test_the_report_has_the_remarks_and_the_rounds(tmp_path):
    hostile = "<script>alert(1)</script>"
    figure = {"value": 0.796, "low": 0.755, "high": 0.838, "n": 100, "unit": "%"}
    rounds = [{"round": 0, "sampled": 0, "metrics": {"pass@1": figure, "pass@1, at once": figure}}]
    rounds.append({"round": 1, "sampled": 4500, "right": 0.437, "kept": 300, "metrics": {"pass@1": figure}})
    put(tmp_path, "rejection", {}, rounds=rounds, config={"max_completion_length": 80})
    lines = history(6, **{**SOUND, "cut_share": 0.4, f"reward/{hostile}": 0.0, f"reward/{hostile}/none": 1.0})
    (tmp_path / "rejection" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report(tmp_path))
    assert_inert(page)
    assert "The doctor step 1: 40% of completions hit the limit of 80 tokens" in page.words
    assert f"None for most rows: {hostile} (100%)" in page.words
    assert "By round Round Samples Right Kept pass@1 0 0 – – 79.6 % [75.5, 83.8] 1 4,500 43.7 % 300" in page.words
    put(tmp_path, "broken", {}, rounds=[{"round": 1}])
    with pytest.raises(UserError, match=r"rounds\[0\]"):
        write_report(tmp_path)


def test_a_resumed_stage_does_not_say_again_what_it_said(tmp_path):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in history(6, reward=0.5, cut_share=0.4)))
    for resumed in (tmp_path, None):
        doctor = doctor_of(SimpleNamespace(config={}, output_dir=tmp_path, resume_folder=resumed))
        said = doctor.look({"step": 7, "reward": 0.5, "cut_share": 0.4})
        assert [remark.key for remark in said] == ([] if resumed else ["cut_share"])


def test_what_cannot_be_diagnosed_is_refused(tmp_path):
    with pytest.raises(UserError, match="no log.jsonl"):
        diagnose(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"step": 1}\nnot json\n')
    with pytest.raises(UserError, match=r"log.jsonl:2: not JSON"):
        diagnose(tmp_path)
    done = subprocess.run([sys.executable, "-m", "posttrain.doctor"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "usage" in done.stderr
