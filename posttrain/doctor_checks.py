"""What the doctor looks for: one pure function a sign, each giving a sentence with its mend, or None.

In: the last lines of a stage's log.jsonl, oldest first, and its config. Out: text about the newest line. A number that
a stage does not log is never remarked on. The bounds stay silent in sound runs: they are wide, and look at means of
several lines. Used by posttrain/doctor.py.
"""

import math
import statistics
from collections.abc import Callable
from itertools import pairwise

SPAN = 10  # steps over which entropy and KL are compared

History = list[dict]


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def series(history: History, key: str) -> list[float]:
    """The values of a key, oldest first."""
    return [line[key] for line in history if key in line]


def recent(history: History, key: str, num: int = 3) -> float | None:
    """Mean of the last `num` values; None while there are fewer, or where the newest line has none."""
    values = series(history, key)
    return statistics.fmean(values[-num:]) if len(values) >= num and key in history[-1] else None


def span(history: History, key: str, steps: int = SPAN) -> tuple[float, float] | None:
    """(mean of the first, mean of the last) up to 3 lines of the last `steps` steps; None below 4 lines."""
    values = series([line for line in history if line["step"] >= history[-1]["step"] - steps], key)
    size = min(3, len(values) // 2)
    return (statistics.fmean(values[:size]), statistics.fmean(values[-size:])) if len(values) >= 4 else None


def ends(history: History, key: str, part: int = 5) -> tuple[float, float] | None:
    """(mean of the first, mean of the last) `part` values of the whole window; None where they would overlap."""
    values = series(history, key)
    return (statistics.fmean(values[:part]), statistics.fmean(values[-part:])) if len(values) >= 2 * part else None


def updates_a_batch(config: dict) -> int:
    return config.get("num_iterations", 1) * config.get("num_minibatches", 1)


# ---- reward ---------------------------------------------------------------------------------------------------------


def reward_saturated(history: History, config: dict) -> str | None:
    reward, same = recent(history, "reward"), recent(history, "zero_signal_groups")
    best = sum(config.get("reward_weights") or [1.0] * len(config.get("reward_funcs") or [1]))
    if reward is None or same is None or reward < 0.97 * best or reward > best or same < 0.8:
        return None
    return f"the reward is {reward:.2f} of {best:g}: there is nothing left to learn here; take harder problems or stop"


def zero_signal(history: History, config: dict) -> str | None:
    same, reward = recent(history, "zero_signal_groups", min(3, len(history))), history[-1].get("reward")
    if same is None or same < 0.5 or "explained_variance" in history[-1] or reward_saturated(history, config):
        return None
    n, seen = config.get("num_generations", "n"), series(history, "reward")
    mend = "look at the reward's mean: near its best, take harder problems, near its worst, easier ones"
    if min(seen) >= 0 and max(seen) <= 1:
        mend = f"the mean reward is {reward:.2f}, so take {'harder' if reward >= 0.5 else 'easier'} problems"
    text = f"all {n} answers of {same:.0%} of the groups score the same, which teaches nothing: {mend}, or raise"
    return f"{text} temperature or num_generations; dynamic_sampling draws others in their place"


def sampled_groups(history: History, config: dict) -> str | None:
    drawn, wanted = recent(history, "sampled_groups"), config.get("num_prompts")
    if drawn is None or not wanted or drawn < 3 * wanted:
        return None
    return (
        f"dynamic sampling draws {drawn:.0f} groups to find {wanted} with signal: most of the generation is thrown "
        "away; take problems that are neither too easy nor too hard"
    )


def reward_fell(history: History, config: dict) -> str | None:
    values = series(history, "reward")
    if len(values) < 12 or "reward" not in history[-1]:
        return None
    means = [statistics.fmean(values[i : i + 3]) for i in range(len(values) - 2)]
    best = max(means)
    noise = 4 * statistics.pstdev([b - a for a, b in pairwise(values)]) / math.sqrt(6)
    if means[-1] > best - max(0.5 * (best - min(means[: means.index(best) + 1])), noise, 0.05):
        return None
    return (
        f"the reward fell from {best:.2f} to {means[-1]:.2f}: the policy has left what works; lower learning_rate, "
        "raise beta, or go back to an earlier checkpoint"
    )


def reward_constant(history: History, config: dict) -> str | None:
    names = [
        key[len("reward/") : -len("/std")] for key in history[-1] if key.startswith("reward/") and key[-4:] == "/std"
    ]
    stuck = [name for name in names if _always(history, f"reward/{name}/std", 0.0)]
    if not names and _always(history, "reward_std", 0.0) and config.get("num_generations", 2) > 1:
        stuck = ["the reward"]
    if not stuck or reward_saturated(history, config):
        return None
    return (
        f"{', '.join(stuck)}: the same for every answer ({history[-1].get('reward', 0):.3g} in all), so nothing is "
        "learned from it: call it by hand on a right and a wrong answer; 0 everywhere often is an answer not found"
    )


def reward_none(history: History, config: dict) -> str | None:
    found = {key[len("reward/") : -len("/none")]: recent(history, key) for key in history[-1] if key.endswith("/none")}
    often = [f"{name} ({share:.0%})" for name, share in found.items() if share is not None and share > 0.5]
    if not often:
        return None
    return f"reward functions that return None for most rows: {', '.join(often)}: do they find the columns they read?"


def over_optimized(history: History, config: dict) -> str | None:
    total = _trend(history, "reward")
    names = [
        key for key in history[-1] if key.startswith(("reward/", "judge/")) and not key.endswith(("/std", "/none"))
    ]
    falling = [(name, trend) for name in names if (trend := _trend(history, name)) is not None and trend[2] < 0]
    if total is None or total[2] <= 0 or not falling:
        return None
    name, (before, after, _) = min(falling, key=lambda each: each[1][2])
    return (
        f"the reward rises ({total[0]:.2f} to {total[1]:.2f}) while {name} falls ({before:.2f} to {after:.2f}): "
        "over-optimization of a proxy, where that one is the judge; raise beta, stop earlier, read rollouts.jsonl"
    )


def _trend(history: History, key: str) -> tuple[float, float, float] | None:
    """(mean of the first third, of the last, -1 | 0 | 1 by more than 3 standard errors); None below 12 values."""
    values = series(history, key)
    if len(values) < 12:
        return None
    size = len(values) // 3
    before, after = statistics.fmean(values[:size]), statistics.fmean(values[-size:])
    noise = statistics.pvariance([b - a for a, b in pairwise(values)]) / 2  # of one value: neighbours share the trend
    sure = abs(after - before) > 3 * math.sqrt(2 * noise / size)
    return before, after, math.copysign(1, after - before) if sure else 0


def _always(history: History, key: str, value: float, num: int = 3) -> bool:
    values = series(history, key)[-num:]
    return len(values) == num and all(each == value for each in values) and key in history[-1]


# ---- replies --------------------------------------------------------------------------------------------------------


def end_unlearned(history: History, config: dict) -> str | None:
    cut, values = recent(history, "cut_share"), series(history, "cut_share")
    if cut is None or cut < 0.95:
        return None
    if min(values) < 0.5:
        begin = f"the share of replies cut at {_limit(config)} rose from {min(values):.0%} to {cut:.0%}, so"
        return f"{begin} ending is being unlearned: lower learning_rate, set missing_eos_penalty"
    mend = "is the template's end token among those that stop them (`posttrain inspect`), and was the model taught it?"
    return f"replies never end: {cut:.0%} hit {_limit(config)}: {mend}"


def cut_share(history: History, config: dict) -> str | None:
    cut = recent(history, "cut_share", min(3, len(history)))
    if cut is None or cut < 0.25 or end_unlearned(history, config):
        return None
    return (
        f"{cut:.0%} of completions hit {_limit(config)}: raise max_completion_length, or teach shorter "
        "replies (missing_eos_penalty, an overlong reward); a cut reply seldom holds its answer"
    )


def _limit(config: dict) -> str:
    return (
        f"the limit of {config['max_completion_length']} tokens" if "max_completion_length" in config else "the limit"
    )


def length_hacked(history: History, config: dict) -> str | None:
    length, reward = ends(history, "completion_length"), ends(history, "reward")
    if not length or not reward or length[1] < 2 * length[0] or reward[1] <= reward[0]:
        return None
    return (
        f"replies grew from {length[0]:.0f} to {length[1]:.0f} tokens as the reward rose: right where thinking pays "
        "(held-out answers improve, too), hacking where a judge likes length: read rollouts.jsonl; loss_type dr_grpo"
    )


def length_collapsed(history: History, config: dict) -> str | None:
    length = ends(history, "completion_length")
    if not length or length[1] > length[0] / 3:
        return None
    shrank = f"replies shrank from {length[0]:.0f} to {length[1]:.0f} tokens"
    return f"{shrank}: the reward may pay for saying little; read rollouts.jsonl"


# ---- policy ---------------------------------------------------------------------------------------------------------


def entropy_fell(history: History, config: dict) -> str | None:
    found = span(history, "entropy")
    if "reward" not in history[-1] or not found or found[1] > 0.5 * found[0] or found[0] < 0.02:
        return None
    return (
        f"entropy fell by half in {SPAN} steps ({found[0]:.2f} to {found[1]:.2f}): the policy stops exploring; lower "
        "learning_rate, raise epsilon_high (0.28) or temperature; fine only where the reward is near its best"
    )


def entropy_rose(history: History, config: dict) -> str | None:
    found = span(history, "entropy")
    if "reward" not in history[-1] or not found or found[1] < 2 * found[0] or found[1] - found[0] < 0.2:
        return None
    return (
        f"entropy rose from {found[0]:.2f} to {found[1]:.2f} in {SPAN} steps: replies turn into noise; lower "
        "learning_rate and entropy_coef, and read rollouts.jsonl"
    )


def kl_grew(history: History, config: dict) -> str | None:
    found = span(history, "kl")
    bound = max(5.0, 0.1 * history[-1].get("completion_length", 0.0))
    if not found or found[1] - found[0] < bound:
        return None
    return (
        f"KL to the start grew from {found[0]:.1f} to {found[1]:.1f} nats a reply in {SPAN} steps: lower "
        "learning_rate, raise beta, or set max_kl"
    )


def kl_negative(history: History, config: dict) -> str | None:
    kl = recent(history, "kl")
    if kl is None or kl > -_negative_bound(history):
        return None
    return (
        f"KL to the start is {kl:.2f} nats a reply, and a mean below 0 by so much is no noise: the log-probabilities "
        "disagree (another temperature or dtype in the engine, or a reference that is not where the policy began)"
    )


def kl_noise(history: History, config: dict) -> str | None:
    kl = history[-1].get("kl")
    if kl is None or not -_negative_bound(history) < kl < -0.005 or kl_negative(history, config):
        return None
    return f"KL {kl:.3f} below 0 is noise: k1 averages log ratios of samples, and only its mean over many is positive"


def _negative_bound(history: History) -> float:
    return max(0.3, 0.01 * history[-1].get("completion_length", 0.0))


def clipped(history: History, config: dict) -> str | None:
    share = recent(history, "clip_ratio")
    if share is None or share < 0.3:
        return None
    return (
        f"the ratio of {share:.0%} of the tokens is clipped: updates are too large for their batch; lower "
        f"learning_rate, or fewer of the {updates_a_batch(config)} updates a batch"
    )


def loss_zero(history: History, config: dict) -> str | None:
    line, often = history[-1], updates_a_batch(config) > 1
    if abs(line.get("loss", 1.0)) >= 5e-4 or abs(line.get("ratio", 1.0) - 1) > 1e-3 or not line.get("grad_norm"):
        return None
    if "reward" not in line or (often and line["step"] > 1):
        return None
    when = "" if often else ", and with one update a batch in all"
    return (
        f"loss 0.000 is normal in the first step on policy{when}: the ratio is 1 and the advantages add up to 0; "
        "the gradient is not 0, and the reward says how it goes"
    )


def mismatch(history: History, config: dict) -> str | None:
    now, values = recent(history, "mismatch"), series(history, "mismatch")
    bound = config.get("max_mismatch", 1.05)
    if now is None or now - 1 < max(0.2 * (bound - 1), 0.005):
        return None
    crept = now - 1 > 2 * (statistics.fmean(values[:3]) - 1)
    begin = f"crept up to {now:.3f}" if crept else f"is {now:.3f}"
    return (
        f"mean exp|log-probability of trainer - of engine| {begin} (the run stops at {bound:g}): --dtype float32, "
        "or a lower vllm_importance_sampling_cap, and look whether weights reach the engine"
    )


def critic_poor(history: History, config: dict) -> str | None:
    values = series(history, "explained_variance")
    warm = config.get("critic_warmup_steps", 0) + SPAN
    if len(values) < 3 or history[-1]["step"] <= warm or (mean := statistics.fmean(values[-3:])) > -0.1:
        return None
    return (
        f"the critic explains {mean:.2f} of the returns' variance, worse than a constant: raise critic_warmup_steps, "
        "change critic_learning_rate, or take a lower lam"
    )


def critic_young(history: History, config: dict) -> str | None:
    value, step = history[-1].get("explained_variance"), history[-1]["step"]
    if value is None or value > 0.05 or step > 3:
        return None
    return f"explained variance {value:.2f} is normal in the first steps: the critic has seen no returns yet"


# ---- optimisation, in every stage -----------------------------------------------------------------------------------


def gradient_spike(history: History, config: dict) -> str | None:
    values = series(history, "grad_norm")
    usual = statistics.median(values[:-1]) if len(values) >= 8 else 0.0
    if usual == 0 or "grad_norm" not in history[-1] or values[-1] < 10 * usual:
        return None
    return (
        f"gradient norm {values[-1]:.3g} is {values[-1] / usual:.0f} times the usual (clipped to "
        f"{config.get('max_grad_norm', 1):g}): one odd batch is harmless; if it comes back, lower learning_rate"
    )


def gradient_zero(history: History, config: dict) -> str | None:
    if not _always(history, "grad_norm", 0.0, 2) or recent(history, "zero_signal_groups", 1) == 1.0:
        return None
    return "the gradient is exactly 0: nothing trains; are weights frozen, labels all masked, or all weights 0?"


def rate_zero(history: History, config: dict) -> str | None:
    step, last = history[-1]["step"], config.get("max_steps", math.inf)
    if not _always(history, "learning_rate", 0.0, 2) or step >= last:
        return None
    return f"learning_rate is 0 from step {step} on, {last - step:g} before the last: the schedule ended too early"


def loss_spike(history: History, config: dict) -> str | None:
    values = series(history, "loss")
    if "reward" in history[-1] or len(values) < 8 or "loss" not in history[-1]:
        return None
    before, usual = values[-8:-1], statistics.median(values[-8:-1])
    if usual <= 0.05 or values[-1] < max(2 * usual, usual + 5 * statistics.stdev(before)):
        return None
    return (
        f"loss {values[-1]:.2f} is {values[-1] / usual:.1f} times the usual: lower learning_rate, longer warmup_steps"
    )


def loss_memorised(history: History, config: dict) -> str | None:
    loss = recent(history, "loss")
    if loss is None or "reward" in history[-1] or not 0 <= loss < 1e-3:
        return None
    return f"loss {loss:.4f}: the rows are known by heart; fewer steps, more rows, and look for rows that repeat"


def held_out_rises(history: History, config: dict) -> str | None:
    key = next((key for key in ("held_out_loss", "validation_loss", "eval_loss") if series(history, key)), None)
    values = series(history, key) if key else []
    if len(values) < 4 or not min(values) < values[-3] < values[-2] < values[-1] or key not in history[-1]:
        return None
    return (
        f"{key} rises since its best ({min(values):.3f}, now {values[-1]:.3f}): over-fitting; stop earlier, more rows"
    )


def pairs_guessed(history: History, config: dict) -> str | None:
    loss, late = recent(history, "loss", 5), history[-1]["step"] > 0.3 * config.get("max_steps", math.inf)
    if config.get("loss_type") != "bradley_terry" or loss is None or not late or abs(loss - math.log(2)) > 0.01:
        return None
    return f"loss {loss:.3f} is ln 2: the reward model guesses; are chosen and rejected told apart by anything?"


def generation_slow(history: History, config: dict) -> str | None:
    share = recent(history, "share/generate", 5)
    if share is None or share < 0.8:
        return None
    return (
        f"generation takes {share:.0%} of a step: use_vllm, more prompts a step, a lower max_completion_length, or "
        "rollout_ahead 1 where the device has room"
    )


def slower(history: History, config: dict) -> str | None:
    values = series(history, "tokens_per_second")
    if len(values) < 9 or "tokens_per_second" not in history[-1]:
        return None
    now, before = statistics.median(values[-3:]), statistics.median(values[:-3])
    if now > 0.5 * before:
        return None
    return f"tokens/s dropped from {before:,.0f} to {now:,.0f}: is the machine shared, hot, or out of memory?"


CHECKS: tuple[Callable[[History, dict], str | None], ...] = (
    reward_saturated, zero_signal, sampled_groups, reward_fell, reward_constant, reward_none, over_optimized,
    end_unlearned, cut_share, length_hacked, length_collapsed, entropy_fell, entropy_rose, kl_grew, kl_negative,
    clipped, mismatch, critic_poor, gradient_spike, gradient_zero, rate_zero, loss_spike, loss_memorised,
    held_out_rises, pairs_guessed, generation_slow, slower,
)  # fmt: skip
NORMAL = (loss_zero, kl_noise, critic_young)
