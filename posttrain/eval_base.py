"""Measure a base model as `posttrain eval` asks: bits per byte, few-shot answers, tiny's facts, regurgitation, tasks.

In: the verb's options. Out: a report as text and, where asked for, as JSON: `metrics` (name -> value, low, high, n,
unit), `conclusions`, and what gives them again: the model's files by hash, data, settings, seed, versions.
"""

import tempfile
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from posttrain import base_evals, few_shot_eval
from posttrain.bestof import Study
from posttrain.data import DataConfig, load_rows
from posttrain.errors import UserError
from posttrain.intervals import measured, measured_ratio
from posttrain.models import load_config

MOST_TOKENS = 64  # of an answer to --few_shot unless --max_tokens says otherwise
TINY_TOKENS = 512  # room for the questions of --suite tiny and their answers


@dataclass
class Found:
    """What was measured; `more` goes into the JSON file alone. `by_row`: for paired differences, the values behind a
    figure, of texts or questions in an order that does not depend on the model; `rows` their places."""

    metrics: dict[str, dict] = field(default_factory=dict)
    conclusions: list[str] = field(default_factory=list)
    more: dict = field(default_factory=dict)
    by_row: dict[str, list[float]] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)


class Subject:
    """The model under study; the engine that samples from it is made when it is first asked for."""

    def __init__(self, options):
        from posttrain.serve import load

        self.options = options
        self.model, self.tokenizer = load(options.model)
        # Models without position limit (state space models) have no such key.
        self.context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**20
        self.scratch = tempfile.TemporaryDirectory(prefix="posttrain-eval-")
        self.study = Study(Path(self.scratch.name), {"seed": self.options.seed}, f"eval {Path(options.model).name}")
        self.longest = 0  # tokens that the engine needs room for

    @cached_property
    def engine(self):
        """vLLM or transformers, as --use_vllm says."""
        from posttrain.rl.rollout import EngineConfig, make_engine

        config = EngineConfig(use_vllm=self.options.use_vllm)
        return make_engine(config, self.model, self.tokenizer, min(self.longest, self.context), self.study)


def report(options) -> str:
    """Everything that the options ask for, as lines; all of it as JSON in the file of --json."""
    from posttrain.eval_report import metric_lines, write_report

    found = measure(options)
    if options.json is not None:
        told = {"metrics": found.metrics, "conclusions": found.conclusions, **found.more}
        settings = {
            key: value for key, value in vars(options).items() if not callable(value) and key not in ("debug", "rest")
        }
        write_report(options.json, told, options.model, settings)
    return "\n".join(metric_lines(found.metrics) + found.conclusions)


def measure(options) -> Found:
    """What the options ask for; flags, files and data are looked at before the model is loaded."""
    options.split, options.max_tokens = options.split or "test", options.max_tokens or MOST_TOKENS
    tasks, asked, found = harness_settings(options), few_shot_eval.settings(options), Found()
    again = regurgitation_settings(options)
    if not (options.data or options.suite or asked or tasks):
        raise UserError(
            "nothing to measure: give --suite NAME, --data (texts, for bits per byte), --few_shot FILE, "
            "--regurgitation or --tasks A,B"
        )
    for flag, needed in (("train_data", "data"), ("include_path", "tasks"), ("limit", "tasks")):
        if getattr(options, flag) is not None and getattr(options, needed) is None:
            raise UserError(f"--{flag}: does nothing without --{needed}; add that or leave it out")
    held_out = texts(options, found, "") if options.data else []
    trained = texts(options, found, "train_") if options.train_data else []
    of_the_world = options.suite == "base" and options.data == "tiny"
    if of_the_world:
        held_out = unseen(held_out, options, found)
    subject = Subject(options)
    jobs = [
        (held_out, 0, lambda: bits(subject, held_out, trained, found)),
        (asked, subject.context, lambda: few_shot_eval.measure(subject, asked, found)),
        (of_the_world, TINY_TOKENS, lambda: sums(subject, found)),
        (options.suite == "tiny", TINY_TOKENS, lambda: tiny(subject)),
        (again, again and again.size + 1, lambda: regurgitation(subject, trained, held_out, again, found)),
        (tasks, 0, lambda: harness(subject, tasks, found)),
    ]
    wanted = [(longest, job) for given, longest, job in jobs if given]
    subject.longest = max(longest for longest, _ in wanted)
    for _, job in wanted:
        found.metrics |= job()
    found.rows = list(range(max(map(len, found.by_row.values()), default=0)))
    return found


def texts(options, found: Found, prefix: str) -> list[str]:
    """The texts of --data (prefix "") or --train_data ("train_"), whose description goes into the JSON file."""

    def given(name: str):
        return getattr(options, prefix + name)

    same = prefix and given("data") == options.data
    name, adapter = (
        given(key) or (getattr(options, key) if same else None) for key in ("data_config", "data_adapter")
    )
    config = DataConfig(given("data"), name, dataset_adapter=adapter, max_rows=given("rows"))
    try:
        rows, description = load_rows(config, given("split"), options.seed, ("text",))
    except UserError as error:
        kind = ", ".join(load_config(options.model).architectures or ["no architecture named"])
        raise UserError(f"{error} ({options.model} is no reward model ({kind}), so rows of text are read)") from error
    found.more[f"{prefix}data"] = description
    return [row["text"] for row in rows]


# --- each measure: name -> figure


def unseen(held_out: list[str], options, found: Found) -> list[str]:
    """tiny's held-out documents without those that stand in its training documents, too, as pretraining leaves out."""
    from posttrain.data import tiny as world

    read = {row["text"] for row in world.rows("documents", "train", None, options.seed)}
    kept = [text for text in held_out if text not in read]
    found.more["data"] |= {"rows": len(kept), "left_out": {"in training, too": len(held_out) - len(kept)}}
    return kept


def bits(subject: Subject, held_out: list[str], trained: list[str], report: Found) -> dict:
    """Bits a byte of the held-out texts and, beside it, of a byte trigram of the training texts; not where those are
    there for --regurgitation, which may ask for more of them than a trigram in Python can read."""
    longest = min(subject.options.max_length, subject.context)
    each, sizes = base_evals.bits_and_bytes(subject.model, subject.tokenizer, held_out, longest)
    mean_size = sum(sizes) / len(sizes)
    # A text's bits over the texts' mean bytes: their mean is the figure, so that differences can be paired by text.
    report.by_row["bits per byte"] = [one / mean_size for one in each]
    found = {"bits per byte": measured_ratio(each, sizes, "bits/byte")}
    if trained and not subject.options.regurgitation:
        found["bits per byte, byte trigram"] = base_evals.ByteTrigram(trained).bits_per_byte(
            list(filter(None, held_out))
        )
    return found


def sums(subject: Subject, found: Found) -> dict:
    """tiny's held-out sums after four solved ones, greedily: the share of right answers."""
    from posttrain.data import tiny as world
    from posttrain.tiny_evals import SUM_TOKENS

    rows = list(world.rows("problems", "test", None, subject.options.seed))
    lines = base_evals.few_shot_answers(
        subject.engine, subject.tokenizer, [row["few_shot"] for row in rows], SUM_TOKENS, subject.context,
        subject.options.seed,
    )  # fmt: skip
    right = [float(world.judged_right("sum", row["answer"], line)) for row, line in zip(rows, lines, strict=True)]
    found.by_row["sums after 4 examples"] = right
    found.samples = [
        {"row": index, "prompt": row["prompt"][-1]["content"], "reply": line, "answer": row["answer"],
         "right": bool(good), "why": "one of the first"}
        for index, (row, line, good) in enumerate(zip(rows[:4], lines, right, strict=False))
    ]  # fmt: skip
    return {"sums after 4 examples": measured(right, "%")}


def tiny(subject: Subject) -> dict:
    from posttrain import tiny_evals

    options = subject.options
    return tiny_evals.measure(
        subject.model, subject.engine, subject.tokenizer, options.seed, subject.context, options.rows
    )


def regurgitation_settings(options):
    """Settings of --regurgitation, None where it is not asked for. UserError where the texts are not given."""
    from posttrain.regurgitation import Settings

    if not options.regurgitation:
        return None
    if options.data is None or options.train_data is None:
        raise UserError(
            "--regurgitation: needs --train_data, which the model was trained on, and --data, held-out texts"
        )
    return Settings(options.prefix_tokens, options.continue_tokens, options.max_passages, options.seed)


def regurgitation(subject: Subject, trained: list[str], held_out: list[str], settings, found: Found) -> dict:
    from posttrain.regurgitation import measure

    if settings.size + 1 > subject.context:
        raise UserError(
            f"--prefix_tokens and --continue_tokens: {settings.size} tokens in all and one to begin with, the model's "
            f"context has {subject.context}; lower one"
        )
    result = measure(subject.engine, subject.tokenizer, trained, held_out, settings)
    found.conclusions.append(result.pop("conclusion"))
    metrics = result.pop("metrics")
    found.more["regurgitation"] = result
    return metrics


def harness_settings(options):
    """Settings of --tasks, None where it is not given. UserError where the harness is missing or a flag is off."""
    from posttrain.harness import Settings, check

    if options.tasks is None:
        return None
    names = tuple(filter(None, (name.strip() for name in options.tasks.split(","))))
    given = options.num_fewshot
    if isinstance(given, list) and len(given) > 1:
        raise UserError(f"--num_fewshot: found {len(given)} numbers, and --tasks takes one; give one")
    shots = given[0] if isinstance(given, list) else given
    settings = Settings(names, options.include_path, shots, options.limit, options.batch_size, options.seed)
    check(settings)
    return settings


def harness(subject: Subject, settings, found: Found) -> dict:
    from posttrain.harness import measure

    result = measure(subject.model, subject.tokenizer, settings)
    found.more["harness"] = result["harness"]
    return result["metrics"]
