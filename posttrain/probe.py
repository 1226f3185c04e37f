"""What does a model know? Ask it, judge what it says, and make data of it: answer this, say "I do not know" to that.

In: a chat model, pretraining documents, an engine. Out, in the stage's folder:
- `questions.jsonl`: questions to learn from, a row each with the evidence: `question`, `prompt`, `answer`, `others`,
  `subject`, `snippet`, `times`, `answers` ([{"text", "verdict"}], n of them), `rate` (share right), `label`;
  a data set for RL with the reward `honest` (posttrain/rewards/honest.py), too;
- `held_out.jsonl`: the same of subjects that are never learned from, for posttrain/knowledge_eval.py;
- `known.jsonl`: `messages` with the model's own right answer, the one it gave most often, and the evidence;
- `unknown.jsonl`: `messages` with a refusal in varied words, and the evidence;
- `kept.jsonl`: `messages` with the model's own replies to other prompts, which keep what else it can.
The last three are data sets for recipes/sft.py; a `dataset_mixture` weighs them.
Launched by `accelerate launch recipes/probe.py --config recipes/knowledge/probe.yaml`.

The method is that of Llama 3 (2407.21783, section 4.3.6); teaching both sides by what the model itself gets right is
R-Tuning's (2311.09677). An answer is `refused` (posttrain/refusals.py), else `right` where `right_func` gives it
`threshold`, else `wrong` where `informative_func` does, else `empty`: it claims nothing. A question is known where at
least `known_rate` of its answers are right, unknown where at most `unknown_rate` are, else mixed: neither is taught.

A step, in log.jsonl and of a checkpoint, is the writing of all questions, or the answering of `batch_questions`.
"""

import json
import unicodedata
from collections import Counter
from dataclasses import dataclass

from posttrain.args import arg, at_least
from posttrain.chat import decode
from posttrain.data import DataConfig
from posttrain.errors import UserError
from posttrain.evals import fit_prompts, prompt_ids
from posttrain.intervals import measured_ratio
from posttrain.probe_questions import (
    ASK,
    WRITER_TOKENS,
    ask_endpoint,
    ask_policy,
    is_held_out,
    require_writer,
    snippets,
    tiny_questions,
    written,
)  # fmt: skip
from posttrain.progress import Progress
from posttrain.refusals import is_refusal, refusal
from posttrain.rewards import load_rewards
from posttrain.rl.rollout import Sampling, make_engine, sample_seed
from posttrain.rl.scoring import call_rewards
from posttrain.rl.types import Rollouts

VERDICTS, LABELS = ("right", "wrong", "refused", "empty"), ("known", "mixed", "unknown")
QUESTION_TOKENS = 160  # a longer question, template and all, is left out
FILES = ("questions.jsonl", "held_out.jsonl", "known.jsonl", "unknown.jsonl", "kept.jsonl")


@dataclass
class ProbeConfig:
    """Probe: who writes questions, how answers are sampled, judged and labelled"""

    writer: str = arg("policy", help="who writes questions: policy (the model itself), endpoint, or tiny's generator")
    writer_options: dict = arg(
        {}, help="endpoint: {base_url, model, ...} as of the reward judge; tiny: {strangers: 400}"
    )
    num_questions: int | None = arg(
        None, help="questions at most, before a model's unusable ones are left out; none = all"
    )
    snippet_chars: int = arg(600, help="length of the passage that a question is written from")
    num_generations: int = arg(8, help="answers sampled to each question")
    temperature: float = arg(1.0, help="sampling temperature of answers")
    max_completion_length: int = arg(64, help="answers are cut at so many tokens")
    batch_questions: int = arg(64, help="questions answered between two checkpoints at most")
    right_func: str = arg("stated", help="reward function that says what is right; judges also read the snippet")
    right_options: dict = arg({}, help="its keywords")
    informative_func: str = arg("informs", help="reward function that says whether an answer claims anything")
    informative_options: dict = arg({}, help="its keywords")
    threshold: float = arg(0.5, help="least value of both functions that counts as yes")
    known_rate: float = arg(0.7, help="known: at least this share of a question's answers is right")
    unknown_rate: float = arg(0.3, help="unknown: at most this share is right")
    refusals: list[str] = arg([], help="words of the taught refusals, with {name} or without; none = our own twelve")
    held_out_share: float = arg(0.5, help="share of subjects whose questions are only measured")
    keep_dataset_name: str | None = arg(
        None, help="prompts whose replies the model is to keep; none = no kept.jsonl rows"
    )
    keep_dataset_config: str | None = arg(None, help="their config")
    keep_rows: int = arg(500, help="use so many of them")
    keep_max_tokens: int = arg(128, help="such replies are cut at so many tokens; a cut one is not kept")

    def __post_init__(self):
        at_least(self, num_questions=1, snippet_chars=1, num_generations=1, max_completion_length=1, batch_questions=1)
        at_least(self, keep_rows=1, keep_max_tokens=1)
        require_writer(self.writer, self.writer_options)
        for words in self.refusals:
            if not is_refusal(words):
                raise UserError(f"refusals: {words!r} is not recognised as a refusal (posttrain/refusals.py)")
        for key in ("known_rate", "unknown_rate", "held_out_share"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"{key}: found {getattr(self, key)}, expected a share from 0 to 1")
        if not self.unknown_rate < self.known_rate:
            raise UserError(
                f"unknown_rate: found {self.unknown_rate}, expected less than known_rate, {self.known_rate}"
            )
        if not self.temperature > 0:
            raise UserError(f"temperature: found {self.temperature}, expected above 0: greedy answers are all alike")


def load_judges(config: ProbeConfig) -> dict:
    """{"right" | "informative": (name, function, weight)}. UserError for a function or an option there is not."""
    asked = {"right": (config.right_func, config.right_options)}
    asked["informative"] = (config.informative_func, config.informative_options)
    loaded = {}
    for key, (name, options) in asked.items():
        try:
            (loaded[key],) = load_rewards([name], [], {name: options} if options else None)
        except UserError as error:
            raise UserError(f"{key}_func, {key}_options: {error}") from error
    return loaded


def keep_data(config: ProbeConfig, source: DataConfig) -> DataConfig | None:
    """The data keys of the prompts whose replies are kept; None for none."""
    if config.keep_dataset_name is None:
        return None
    name, kind = config.keep_dataset_name, config.keep_dataset_config
    return DataConfig(name, kind, max_rows=config.keep_rows, dataset_seed=source.dataset_seed)


def load_engine(engines, accelerator, policy, tokenizer, keep: list[dict], config: ProbeConfig, run):
    """(engine with room for all that is sampled, the rows to keep that fit the model's context)."""
    if accelerator.num_processes > 1:
        raise UserError(
            f"a probe runs in one process, found {accelerator.num_processes}: for more speed let vLLM have the GPUs, "
            "with `posttrain serve MODEL` and --use_vllm server"
        )
    writing = len(tokenizer(ASK)["input_ids"]) + config.snippet_chars if config.writer == "policy" else 0
    length = max(QUESTION_TOKENS, writing) + max(config.max_completion_length, WRITER_TOKENS if writing else 0) + 16
    if keep:
        sizes = [len(prompt_ids(tokenizer, row)) for row in keep]
        keep, longest = fit_prompts(run, policy, keep, sizes, config.keep_max_tokens + 1)
        length = max(length, longest)
    length = min(length, policy.config.max_position_embeddings)
    return make_engine(engines, policy, tokenizer, length, run), keep


class Prober:
    """`judges`: {"right" | "informative": (name, function, weight)}; `keep`: rows with `prompt`."""

    def __init__(self, run, config: ProbeConfig, engine, tokenizer, stops, judges: dict, keep: list[dict], world: int):
        self.run, self.config, self.engine, self.tokenizer, self.stops = run, config, engine, tokenizer, tuple(stops)
        self.judges, self.keep, self.world, self.seed = judges, keep, world, run.config["seed"]
        self.rows: list[dict] = []
        self.left_out: dict[str, int] = {}
        self.done = self.tokens = 0
        if run.resume_folder is not None:
            state = json.loads((run.resume_folder / "probe.json").read_text(encoding="utf-8"))
            self.rows, self.left_out, self.done, self.tokens = (
                state[k] for k in ("rows", "left_out", "done", "tokens")
            )

    def probe(self, documents: list[str]) -> None:
        """Write, ask, judge and label, from where an earlier run was stopped; a signal saves first."""
        with self.run.running():
            if not self.rows:
                self._write(documents)
                self._save()
            size = self.config.batch_questions
            progress = Progress(self.run.name, len(self.rows), "question", initial=self.done)
            while self.done < len(self.rows) and not self.run.stopping:
                batch = self.rows[self.done : self.done + size]
                self._answer(batch, sample_seed(self.seed, 1 + self.done))
                self.done += len(batch)
                told = shares(batch)
                self.run.log(self.step, questions=self.done, **told)
                progress.update(len(batch), **told)
                if self.run.due(self.step, -1):
                    self._save()
            progress.close()

    @property
    def step(self) -> int:
        return 1 + -(-self.done // self.config.batch_questions)

    def _write(self, documents: list[str]) -> None:
        config, name = self.config, self.config.writer
        if name == "tiny":
            rows = tiny_questions(documents, config.num_questions, self.world, **config.writer_options)
        else:
            texts = snippets(documents, config.num_questions, config.snippet_chars, self.seed)
            if name == "policy":
                replies = ask_policy(self.engine, self.tokenizer, self.stops, texts, self.seed)
            else:
                replies = ask_endpoint(texts, config.writer_options)
            rows, self.left_out = written(texts, replies)
        if not rows:
            raise UserError(
                f"writer: {name} wrote no question that can be used ({self.left_out or 'no document states a fact'}); "
                "take a model that follows instructions, or other documents"
            )
        rows = self._that_fit(rows)
        for row in rows:
            row["split"] = "test" if is_held_out(row["subject"], config.held_out_share) else "train"
        self.rows = rows
        sides = Counter(row["split"] for row in rows)
        told = "".join(f"; {count} left out: {why}" for why, count in self.left_out.items())
        self.run.note(
            f"{len(rows)} questions by {name}: {sides['train']} to learn from, {sides['test']} held out{told}"
        )

    def _that_fit(self, rows: list[dict]) -> list[dict]:
        """The rows whose question leaves room for an answer."""
        fitting = [row for row in rows if len(prompt_ids(self.tokenizer, row)) <= QUESTION_TOKENS]
        if len(fitting) < len(rows):
            self.left_out[f"longer than {QUESTION_TOKENS} tokens"] = len(rows) - len(fitting)
        return fitting

    def _answer(self, rows: list[dict], seed: int) -> None:
        """The questions' answers, verdicts, rates and labels, into their rows."""
        config = self.config
        found, tokens = ask(self.engine, self.tokenizer, rows, config.num_generations, config.max_completion_length,
                            config.temperature, self.stops, seed, self.judges, config.threshold)  # fmt: skip
        self.tokens += tokens
        for row, answers in zip(rows, found, strict=True):
            row["answers"] = answers
            row["rate"] = sum(answer["verdict"] == "right" for answer in answers) / len(answers)
            row["label"] = label(row["rate"], config)

    def _save(self) -> None:
        state = {"rows": self.rows, "left_out": self.left_out, "done": self.done, "tokens": self.tokens}
        self.run.save(
            self.step, lambda folder: (folder / "probe.json").write_text(json.dumps(state), encoding="utf-8")
        )

    def write(self, folder) -> None:
        """All data sets into `folder`. UserError where there is nothing to learn from."""
        learn = [row for row in self.rows if row["split"] == "train"]
        data = {
            "questions.jsonl": learn,
            "held_out.jsonl": [row for row in self.rows if row["split"] == "test"],
            "known.jsonl": [taught(row, common_right(row)) for row in learn if row["label"] == "known"],
            "unknown.jsonl": [taught(row, self._refusal(row)) for row in learn if row["label"] == "unknown"],
            "kept.jsonl": self._kept(),
        }  # fmt: skip
        for name, rows in data.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (folder / name).write_text(text, encoding="utf-8")
        self.run.note(", ".join(f"{name} {len(rows)}" for name, rows in data.items()))

    def _refusal(self, row: dict) -> str:
        """In varied words, which the question and the seed draw."""
        name = row["subject"] if row["subject"] in row["question"] else ""
        return refusal(name, f"{self.seed} {row['question']}", self.config.refusals)

    def _kept(self) -> list[dict]:
        """The model's own replies to the prompts whose replies it is to keep, one each; a cut one is left out."""
        if not self.keep:
            return []
        sampling = Sampling(1, self.config.keep_max_tokens, self.stops)
        ids = [prompt_ids(self.tokenizer, row) for row in self.keep]
        replies = self.engine.generate(ids, sampling, sample_seed(self.seed, 0, 0))
        self.tokens += sum(len(reply.ids) for reply in replies)
        return [
            {"messages": [*row["prompt"], {"role": "assistant", "content": decode(self.tokenizer, reply.ids)}]}
            for row, reply in zip(self.keep, replies, strict=True) if reply.stop == "stop"
        ]  # fmt: skip

    def samples(self, num: int = 2) -> list[dict]:
        """The first `num` questions of each label with two answers, for the report."""
        chosen = [row for name in LABELS for row in [r for r in self.rows if r["label"] == name][:num]]
        return [
            {"prompt": row["question"], "replies": [
                {"by": f"{row['label']}, {answer['verdict']}", "text": answer["text"]} for answer in row["answers"][:2]
            ]}
            for row in chosen
        ]  # fmt: skip

    def metrics(self) -> dict[str, dict]:
        """Shares of labels and verdicts with 95 % intervals; a subject is one observation."""
        found = {f"questions {name}": by_subject(self.rows, lambda r, n=name: r["label"] == n) for name in LABELS}
        return found | {
            f"answers {name}": by_subject(self.rows, lambda r, n=name: share_of(r["answers"], n)) for name in VERDICTS
        }


# ---- one question ---------------------------------------------------------------------------------------------------


def ask(
    engine, tokenizer, rows, n: int, max_tokens: int, temperature: float, stops, seed: int, judges: dict,
    threshold: float,
) -> tuple[list[list[dict]], int]:  # fmt: skip
    """(n answers {"text", "verdict"} to each row, tokens sampled)."""
    ids = [prompt_ids(tokenizer, row) for row in rows]
    completions = engine.generate(ids, Sampling(n, max_tokens, tuple(stops), temperature), seed)
    repeated = [row for row in rows for _ in range(n)]
    texts = [decode(tokenizer, completion.ids) for completion in completions]
    rollouts = Rollouts(repeated, [each for each in ids for _ in range(n)], completions, n)
    verdicts = judged(texts, rollouts, tokenizer, judges, threshold)
    answers = [{"text": text, "verdict": verdict} for text, verdict in zip(texts, verdicts, strict=True)]
    return [answers[i : i + n] for i in range(0, len(answers), n)], sum(len(c.ids) for c in completions)


def judged(texts: list[str], rollouts: Rollouts, tokenizer, judges: dict, threshold: float) -> list[str]:
    """A verdict for each answer. Where nobody knows the answer, nothing is right."""
    informed = Rollouts(
        [with_source(row) for row in rollouts.rows],
        rollouts.prompt_ids,
        rollouts.completions,
        rollouts.num_generations,
    )
    (right,) = call_rewards([judges["right"]], informed, tokenizer).values()
    (informs,) = call_rewards([judges["informative"]], rollouts, tokenizer).values()
    verdicts = []
    for text, row, is_right, is_informative in zip(texts, rollouts.rows, right, informs, strict=True):
        if is_refusal(text):
            verdicts.append("refused")
        elif row["answer"] and (is_right or 0.0) >= threshold:
            verdicts.append("right")
        else:
            verdicts.append("wrong" if (is_informative or 0.0) >= threshold else "empty")
    return verdicts


def with_source(row: dict) -> dict:
    """The row with its snippet and answer beside the question, for a judge of what is right."""
    if not row["snippet"]:
        return row
    text = f"{row['question']}\n\nReference text:\n{row['snippet']}\n\nAnswer by the reference: {row['answer']}"
    return {**row, "prompt": [{"role": "user", "content": text}]}


def label(rate: float, config: ProbeConfig) -> str:
    """known, unknown or mixed, by the share of right answers."""
    if rate >= config.known_rate:
        return "known"
    return "unknown" if rate <= config.unknown_rate else "mixed"


def common_right(row: dict) -> str:
    """The right answer that was given most often, but for space and case; of equals the first."""
    right = [answer["text"] for answer in row["answers"] if answer["verdict"] == "right"]
    times = Counter(map(plain, right))
    return max(right, key=lambda text: times[plain(text)]).strip()


def plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split()).casefold()


def taught(row: dict, reply: str) -> dict:
    """The row as a conversation that ends in `reply`, with its evidence."""
    evidence = {key: value for key, value in row.items() if key not in ("prompt", "split")}
    return {"messages": [*row["prompt"], {"role": "assistant", "content": reply}], **evidence}


def share_of(answers: list[dict], verdict: str) -> float:
    return sum(answer["verdict"] == verdict for answer in answers) / len(answers)


def shares(rows: list[dict]) -> dict[str, float]:
    """Shares of labels and verdicts, for the log."""
    found = {name: sum(row["label"] == name for row in rows) / len(rows) for name in LABELS}
    return found | {name: sum(share_of(row["answers"], name) for row in rows) / len(rows) for name in VERDICTS[:3]}


def by_subject(rows: list[dict], value) -> dict:
    """Mean of `value(row)` over rows with its 95 % interval; rows about one subject are one observation, for what is
    known of a person hangs together."""
    above, below = Counter(), Counter()
    for row in rows:
        above[row["subject"]] += float(value(row))
        below[row["subject"]] += 1
    return measured_ratio([above[name] for name in below], [below[name] for name in below], "%")
