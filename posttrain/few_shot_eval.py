r"""How many questions of a file a model answers after 0, 1, 2, ... of its first rows as examples: a curve.

In: `--few_shot FILE`, JSONL of `input` and `output`, where wanted with `answer` (what a right reply states) and
`others` (what it must not state besides); numbers of examples. Out: for each of them the share answered word for word,
the share that states the answer, and how near replies are to the outputs (chrF, BLEU). The rows behind the largest
number of examples are asked, so that all figures are of the same questions. Run:

    posttrain eval runs/tiny/pretrain --few_shot examples/few_shot_facts.jsonl --num_fewshot 0 1 4
    posttrain eval MODEL --few_shot pairs.jsonl --few_shot_format 'en: {input}\nfr: {output}' --similarity chrf
    posttrain eval CHAT_MODEL --few_shot talk.jsonl --as_turns     # examples as turns of its template

chrF (Popović 2015) and BLEU (Papineni et al. 2002, smoothed, effective order) are sacrebleu's sentence scores, 0 to
100, in the mean over replies, so that the interval is that of a mean.
"""

from dataclasses import dataclass

from posttrain.base_evals import few_shot_answers, greedy_replies
from posttrain.errors import UserError
from posttrain.few_shot import Example, Form, read_examples
from posttrain.intervals import measured

SHOWN = 4  # rows that are shown unless --num_fewshot says otherwise
SIMILARITIES = {"chrf": "sentence chrF", "bleu": "sentence BLEU"}


@dataclass(frozen=True)
class Asked:
    """What --few_shot asks: `shots`, numbers of examples; the rows, the first of which are the examples."""

    rows: list[Example]
    shots: list[int]
    form: Form
    as_turns: bool
    similarity: list[str]

    @property
    def questions(self) -> list[Example]:
        return self.rows[max(self.shots) :]


def settings(options) -> Asked | None:
    """What the flags ask for, None without --few_shot. UserError for numbers and flags that do not fit."""
    flags = {"few_shot_format": None, "as_turns": False, "similarity": None}
    if not options.few_shot:
        for flag, usual in flags.items():
            if getattr(options, flag) != usual:
                raise UserError(f"--{flag}: does nothing without --few_shot FILE; add that or leave it out")
        return None
    if options.as_turns and options.few_shot_format is not None:
        raise UserError("--few_shot_format: found with --as_turns, whose form is the chat template; leave one out")
    rows, shots = read_examples(options.few_shot), numbers(options.num_fewshot)
    wrong = [number for number in shots if not 0 <= number < len(rows)]
    if wrong:
        raise UserError(
            f"--num_fewshot: found {wrong[0]}, and {options.few_shot} has {len(rows)} rows: the first --num_fewshot "
            "are shown and all others asked, so give fewer, or a file with more rows"
        )
    if options.similarity:
        _scorers(options.similarity)  # missing ones say so before the model is loaded
    return Asked(rows, shots, Form.read(options.few_shot_format), options.as_turns, options.similarity or [])


def numbers(num_fewshot: int | list[int] | None) -> list[int]:
    """Ascending, each once; SHOWN where none is given."""
    given = [SHOWN] if num_fewshot is None else num_fewshot
    return sorted(set(given if isinstance(given, list) else [given]))


def measure(subject, asked: Asked, found) -> dict[str, dict]:
    """name -> figure; `found.more` gets the answers and, of several numbers of examples, the curve."""
    metrics, curve, answers = {}, [], []
    for shots in asked.shots:
        replies = _turns(subject, asked, shots) if asked.as_turns else _lines(subject, asked, shots)
        point = {name: measured(values, unit) for name, (values, unit) in _judged(asked, replies).items()}
        behind = f"after {shots} example{'' if shots == 1 else 's'}"
        metrics |= {f"{name} {behind}": figure for name, figure in point.items()}
        curve.append({"examples": shots, **point})
        answers += [
            {"input": row.input, "output": row.output, "answer": reply, "examples": shots}
            for row, reply in zip(asked.questions, replies, strict=True)
        ]
    found.more["answers"] = answers
    if len(curve) > 1:
        found.more["few_shot_curve"] = curve
    return metrics


def _lines(subject, asked: Asked, shots: int) -> list[str]:
    """The line that follows each question, the examples before it."""
    options, before = subject.options, "".join(asked.form.example(row) for row in asked.rows[:shots])
    prompts = [before + asked.form.question(row.input) for row in asked.questions]
    return few_shot_answers(
        subject.engine, subject.tokenizer, prompts, options.max_tokens, subject.context, options.seed
    )


def _turns(subject, asked: Asked, shots: int) -> list[str]:
    """The chat model's reply to each question, the examples as turns before it."""
    from posttrain.chat import decode, stop_ids
    from posttrain.evals import prompt_ids

    tokenizer, before = subject.tokenizer, []
    for row in asked.rows[:shots]:
        before += [{"role": "user", "content": row.input}, {"role": "assistant", "content": row.output}]
    prompts = [
        prompt_ids(tokenizer, {"prompt": [*before, {"role": "user", "content": row.input}]}) for row in asked.questions
    ]
    stops, options = stop_ids(tokenizer, subject.model), subject.options
    found = greedy_replies(subject.engine, prompts, options.max_tokens, stops, subject.context, options.seed)
    return [decode(tokenizer, completion.ids, stops).strip() for completion in found]


def _judged(asked: Asked, replies: list[str]) -> dict[str, tuple[list[float], str]]:
    """name -> (a value a reply, unit)."""
    pairs = list(zip(asked.questions, replies, strict=True))
    found = {"exact match": ([float(reply == row.output) for row, reply in pairs], "%")}
    if all(row.answer is not None for row in asked.questions):
        from posttrain.rewards.honest import verdict

        right = [float(verdict(reply, row.answer, row.others) == "right") for row, reply in pairs]
        found["right answers"] = (right, "%")
    for name, score in _scorers(asked.similarity).items():
        found[name] = ([score(reply, [row.output]).score for row, reply in pairs], "")
    return found


def _scorers(names: list[str]) -> dict:
    """Figure's name -> sacrebleu's function of (reply, [output])."""
    if not names:
        return {}
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise UserError(
            f"--similarity {names[0]}: sacrebleu is not installed: pip install 'posttrain[eval]'"
        ) from error
    every = {"chrf": CHRF().sentence_score, "bleu": BLEU(effective_order=True).sentence_score}
    return {SIMILARITIES[name]: every[name] for name in names}
