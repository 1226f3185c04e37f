"""What a model says of things it knows and of things it does not, before and after it was taught its limits.

In: a finished probe (posttrain/probe.py), whose held-out questions carry labels; the model that was probed and the one
trained since; problems whose solving must not suffer. Out: shares right, wrong and refused for each label, before,
after and their paired change; over-refusal (refusals of known questions); how often an answer that many samples agree
on is right, as points for a curve; all with 95 % intervals. Launched by
`accelerate launch recipes/knowledge.py --config recipes/knowledge/knowledge.yaml`.

The labels come from the probe's own samples and the figures from fresh ones, of the same seeds before and after: what
was labelled known by luck is no more often right afterwards, and would else look like a loss. Questions about one
subject are one observation.
"""

import json
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path

from posttrain.args import arg, at_least
from posttrain.errors import UserError
from posttrain.evals import ReplyConfig, by_prompt, metric_of, prompt_ids, sample_replies
from posttrain.figures import measure as shown
from posttrain.identity_eval import claims, read_text
from posttrain.intervals import gain, measured, measured_ratio
from posttrain.manifests import read_manifest
from posttrain.probe import LABELS, VERDICTS, ProbeConfig, ask, by_subject, load_judges, plain, share_of
from posttrain.probe_questions import SENTENCE_END
from posttrain.rewards import load_rewards
from posttrain.rl.rollout import make_engine
from posttrain.rl.scoring import call_rewards

KNOWLEDGE_SEED = 40_000  # apart from the probe's own samples, which gave the labels
UNHEARD, WRITTEN = "unknown, nobody has heard of", "unknown, written about"
FEWER, LOST = 0.7, 0.03  # goals: so much less wrong of what is unknown; so little less right of what is known


@dataclass
class KnowledgeConfig:
    """Knowledge: which probe's held-out questions are asked, and how"""

    probe_path: str = arg(help="folder of the finished probe whose held-out questions are asked")
    num_answers: int = arg(8, help="answers sampled to each question, at the probe's temperature")

    def __post_init__(self):
        at_least(self, num_answers=1)


@dataclass
class Probed:
    """What a finished probe says: the model it asked, how it judged, the held-out questions."""

    model: str
    config: ProbeConfig
    rows: list[dict]

    @property
    def groups(self) -> dict[str, list[dict]]:
        """Group -> its questions. The unknown ones stand in a group of their own by whether anybody knows them."""
        found = {name: [row for row in self.rows if row["label"] == name] for name in LABELS}
        parts = {WRITTEN: True, UNHEARD: False}
        if len({bool(row["answer"]) for row in found["unknown"]}) == 2:
            found |= {n: [r for r in found["unknown"] if bool(r["answer"]) is known] for n, known in parts.items()}
        return {name: rows for name, rows in found.items() if rows}


def read_probe(folder: str) -> Probed:
    """UserError for a folder that is no finished probe, or a probe without held-out questions."""
    manifest = read_manifest(Path(folder)) or {}
    if manifest.get("stage") != "probe":
        found = manifest.get("stage") or "no finished stage"
        raise UserError(f"probe_path: {folder} holds {found}, expected a probe: run recipes/probe.py first")
    file = Path(folder) / "held_out.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if not rows:
        raise UserError(f"{file}: no held-out questions: run the probe with a held_out_share above 0")
    names = {field.name for field in fields(ProbeConfig)}
    known = {key: value for key, value in manifest["config"].items() if key in names}
    return Probed(manifest["parents"]["policy"]["path"], ProbeConfig(**known), rows)


# ---- measuring ------------------------------------------------------------------------------------------------------


@dataclass
class Said:
    """One model's answers to the held-out questions, and its score on each problem."""

    answers: list[list[dict]]  # {"text", "verdict"}, in the order of the questions
    skill: list[float]  # mean score of each problem


class Asker:
    """Asks models of one shape the same questions through one engine."""

    def __init__(
        self, probed: Probed, config: KnowledgeConfig, engines, replies: ReplyConfig, problems: list[dict], run
    ):
        self.probed, self.config, self.engines, self.replies = probed, config, engines, replies
        self.problems, self.run, self.engine, self.shape = problems, run, None, None
        self.judges = load_judges(probed.config)
        self.rewards = load_rewards(replies.eval_reward_funcs[:1], [], replies.eval_reward_options)
        if not self.rewards:
            raise UserError("eval_reward_funcs: found none, expected the function that judges the problems")

    def ask(self, model, tokenizer, stops) -> Said:
        """UserError for a second model of another shape than the first."""
        shape = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        if self.engine is None:
            sizes = [len(prompt_ids(tokenizer, row)) for row in [*self.probed.rows, *self.problems]]
            room = max(sizes) + max(self.probed.config.max_completion_length, self.replies.eval_max_tokens) + 16
            room = min(room, model.config.max_position_embeddings)
            self.engine, self.shape = make_engine(self.engines, model, tokenizer, room, self.run), shape
        elif shape != self.shape:
            raise UserError(
                f"model_name_or_path: its weights have other shapes than those of {self.probed.model}, which was "
                "probed: name a model that was trained from it"
            )
        self.engine.sync_weights(model)
        judged = self.probed.config
        answers, _ = ask(
            self.engine, tokenizer, self.probed.rows, self.config.num_answers, judged.max_completion_length,
            judged.temperature, stops, KNOWLEDGE_SEED, self.judges, judged.threshold,
        )  # fmt: skip
        rollouts = sample_replies(self.engine, tokenizer, self.problems, self.replies, stops)
        (scores,) = call_rewards(self.rewards, rollouts, tokenizer).values()
        groups = by_prompt([score or 0.0 for score in scores], rollouts.num_generations)
        return Said(answers, [sum(group) / len(group) for group in groups])


def compare(probed: Probed, before: Said, after: Said, replies: ReplyConfig) -> dict:
    """metrics, gains, the table (rows of shares) and the curve's points, as the manifest keeps them."""
    sides = zip(probed.rows, before.answers, after.answers, strict=True)
    rows = [{**row, "before": one, "after": two} for row, one, two in sides]
    groups = Probed(probed.model, probed.config, rows).groups
    metrics = {}
    for group, members in groups.items():
        for verdict in VERDICTS[:3]:
            metrics |= paired(f"{verdict}, {group}", members, verdict)
    skill = metric_of(replies.eval_reward_funcs[0])
    unit = "%" if skill == "pass@1" else ""
    metrics[f"problems, {skill}, before"] = measured(before.skill, unit)
    metrics[f"problems, {skill}"] = measured(after.skill, unit)
    changes = [b - a for a, b in zip(before.skill, after.skill, strict=True)]
    metrics[f"problems, {skill}, change"] = signed(measured(changes), unit)
    if groups.get("unknown"):
        metrics["wrong of the unknown, fewer by"] = fewer(groups["unknown"], "wrong")
    curves = {side: agreement_curve(rows, side) for side in ("before", "after")}
    return {"metrics": metrics, "gains": gains_of(metrics, skill), "agreement": curves}


def signed(entry: dict, unit: str) -> dict:
    """A change of a share may be negative, so its interval is not cut at 0."""
    return {**entry, "unit": unit}


def paired(name: str, rows: list[dict], verdict: str) -> dict[str, dict]:
    """Share of a verdict before, after, and the change of the same questions."""
    found = {}
    for side, key in (("before", f"{name}, before"), ("after", name)):
        found[key] = by_subject(rows, lambda row, side=side: share_of(row[side], verdict))
    above, below = Counter(), Counter()
    for row in rows:
        above[row["subject"]] += share_of(row["after"], verdict) - share_of(row["before"], verdict)
        below[row["subject"]] += 1
    change = measured_ratio([above[subject] for subject in below], list(below.values()), "")
    return found | {f"{name}, change": signed(change, "%")}


def fewer(rows: list[dict], verdict: str) -> dict:
    """1 - after / before of a verdict's share, over subjects; 0 of 0 is none fewer."""
    above, below = Counter(), Counter()
    for row in rows:
        above[row["subject"]] += share_of(row["before"], verdict) - share_of(row["after"], verdict)
        below[row["subject"]] += share_of(row["before"], verdict)
    if not sum(below.values()):
        return {"value": 0.0, "low": None, "high": None, "n": len(below), "unit": "%"}
    return signed(measured_ratio([above[s] for s in below], [below[s] for s in below], ""), "%")


def gains_of(metrics: dict, skill: str) -> list[dict]:
    """Fewer wrong answers where the model does not know; as many right ones where it does; as many problems solved."""
    labels, found = ("probed", "taught"), []
    if "wrong, unknown" in metrics:
        sides = metrics["wrong, unknown, before"], metrics["wrong, unknown"]
        passed = metrics["wrong of the unknown, fewer by"]["value"] >= FEWER
        goal = f">= {FEWER * 100:.0f} % fewer"
        found.append(gain("wrong, unknown", *sides, labels=labels, goal=goal, passed=passed, better="lower"))
    for name in ("right, known", f"problems, {skill}"):
        if name in metrics:
            passed = metrics[f"{name}, change"]["value"] > -LOST
            sides, goal = (metrics[f"{name}, before"], metrics[name]), f"< {LOST * 100:.0f} points fewer"
            found.append(gain(name, *sides, labels=labels, goal=goal, passed=passed))
    return found


def agreement_curve(rows: list[dict], side: str) -> list[dict]:
    """Points {"agreement", "right": figure, "questions"}: of the questions that anybody can answer, by the share of
    samples that give the same answer (refusals aside, the answer given most often), how often that answer is right."""
    bins: dict[float, list[dict]] = {}
    for row in rows:
        said = [a for a in row[side] if a["verdict"] in ("right", "wrong")]
        if row["answer"] and said:
            keys = [claim(a["text"], row) for a in said]
            most, times = Counter(keys).most_common(1)[0]
            right = said[keys.index(most)]["verdict"] == "right"
            bins.setdefault(times / len(row[side]), []).append({"subject": row["subject"], "right": right})
    return [
        {"agreement": share, "right": by_subject(found, lambda each: each["right"]), "questions": len(found)}
        for share, found in sorted(bins.items())
    ]


def claim(text: str, row: dict) -> str:
    """What an answer says, so that two can be compared: the value it claims where values are known, else its first
    sentence but for space and case."""
    values = [row["answer"], *row["others"]]
    found = sorted(claims(read_text(text), values)) if row["others"] else []
    return ", ".join(found) if found else plain(SENTENCE_END.split(text)[0])


# ---- the table ------------------------------------------------------------------------------------------------------


def markdown(metrics: dict, probed: Probed, skill: str) -> str:
    """The table: a line for each group and verdict, before, after and the paired change."""
    lines = ["| held-out questions | n | answers | before | after | change |", "|---|---|---|---|---|---|"]
    for group, rows in probed.groups.items():
        for verdict in VERDICTS[:3]:
            told = "refused (over-refusal)" if (verdict, group) == ("refused", "known") else verdict
            lines.append(f"| {group} | {len(rows)} | {told} | " + _cells(metrics, f"{verdict}, {group}") + " |")
    n = metrics[f"problems, {skill}"]["n"]
    return "\n".join([*lines, f"| problems | {n} | {skill} | " + _cells(metrics, f"problems, {skill}") + " |"])


def _cells(metrics: dict, name: str) -> str:
    names = (f"{name}, before", name, f"{name}, change")
    return " | ".join(" ".join(shown(metrics[key], metrics[key]["unit"])) for key in names)


def write(folder: Path, probed: Probed, before: Said, after: Said, table: str) -> None:
    """table.md and replies.jsonl: each held-out question with both models' answers."""
    (folder / "table.md").write_text(table + "\n", encoding="utf-8")
    with open(folder / "replies.jsonl", "w", encoding="utf-8") as file:
        for row, one, two in zip(probed.rows, before.answers, after.answers, strict=True):
            kept = {key: row[key] for key in ("question", "answer", "subject", "times", "label", "rate")}
            file.write(json.dumps({**kept, "before": one, "after": two}, ensure_ascii=False) + "\n")


def samples(probed: Probed, before: Said, after: Said, num: int = 2) -> list[dict]:
    """The first `num` questions of each group with an answer from before and one from after, for the report."""
    found, place = [], {id(row): index for index, row in enumerate(probed.rows)}
    for group, rows in probed.groups.items():
        for row in rows[:num] if group != "unknown" or WRITTEN not in probed.groups else []:
            at, sides = place[id(row)], (("before", before), ("after", after))
            told = [{"by": f"{name}, {group}", "text": said.answers[at][0]["text"]} for name, said in sides]
            found.append({"prompt": row["question"], "replies": told})
    return found
