"""How much data a stage has, against how much its steps will take: passes over it.

In: a stage's YAML as `forecast_plan.Asked`. Out: a `Supply` from all rows counted and a sample of them encoded, where
the data is tiny's or stands in local files; of what is streamed or on the Hub, in words why it is not known.
"""

from dataclasses import dataclass

from posttrain.data import entries, load_rows
from posttrain.data.files import is_local
from posttrain.forecast_plan import Asked, Work, missing_parents

SAMPLE = 200  # rows that are encoded
COLUMNS = {"sft": "messages", "tokenizer": "text", "pretrain": "text"}
UNITS = {"tokenizer": "bytes", "pretrain": "tokens", "sft": "tokens", "reward": "rankings", "rejection": "problems"}


@dataclass(frozen=True)
class Supply:
    """rows: of training data, 0 where not known; mean: tokens (tokenizer: bytes) of one, in a sample; why: what stands
    in the way of knowing."""

    unit: str
    rows: int
    mean: float | None
    why: str = ""

    @property
    def available(self) -> float | None:
        """Units of data that there are; None where that is not known."""
        if self.unit not in ("tokens", "bytes"):
            return self.rows or None
        return None if self.mean is None else self.rows * self.mean

    def passes(self, planned: float | None) -> float | None:
        """How often all of it is used by a run that takes `planned` units."""
        return None if planned is None or self.available is None else planned / self.available


def supply(asked: Asked) -> Supply:
    """Count a stage's training rows and measure some of them."""
    source, unit = asked.configs["DataConfig"], UNITS.get(asked.stage, "prompts")
    if source.streaming:
        return Supply(unit, 0, None, "streamed: nobody knows before it has been read")
    names = [entry.dataset_name for entry, _ in entries(source, source.dataset_train_split)]
    if far := [name for name in names if name != "tiny" and not is_local(name)]:
        return Supply(unit, 0, None, f"{far[0]} is on the Hub: known once it has been read")
    column = COLUMNS.get(asked.stage, "prompt")
    rows, _ = load_rows(source, source.dataset_train_split, asked.key("seed"), (column,))
    sample = rows[:: max(1, len(rows) // SAMPLE)]
    if asked.stage == "tokenizer":
        sizes = [len(row["text"].encode()) for row in sample]
    elif missing_parents(asked):
        return Supply(unit, len(rows), None, "its tokenizer is not there yet")
    else:
        sizes = _token_counts(asked, sample)
    return Supply(unit, len(rows), sum(sizes) / len(sizes))


def planned(asked: Asked, work: Work) -> float | None:
    """Units of data that the whole run takes."""
    if asked.stage in ("pretrain", "sft"):
        return work.steps * work.tokens
    if asked.stage == "reward":
        return work.steps * asked.configs["RewardConfig"].batch_size
    if asked.stage in ("ppo", "grpo"):
        return work.steps * asked.configs["RLConfig"].num_prompts
    return None


def _token_counts(asked: Asked, rows: list[dict]) -> list[int]:
    from posttrain.models import load_tokenizer

    name = asked.key("tokenizer_path") or asked.key("model_name_or_path")
    tokenizer = load_tokenizer(name, asked.key("model_revision"))
    if asked.stage == "pretrain":
        return [
            1 + len(ids) for ids in tokenizer([row["text"] for row in rows], add_special_tokens=False)["input_ids"]
        ]
    if asked.stage == "sft":
        from posttrain.chat import set_template
        from posttrain.sft_rows import encode_chats

        set_template(tokenizer, _small_model(tokenizer), asked.key("chat_template_path"))
        return [len(chat.input_ids) for chat in encode_chats(tokenizer, rows)]
    if asked.stage == "reward":
        from posttrain.ranking_rows import encode_rankings

        rankings, _ = encode_rankings(tokenizer, rows, asked.key("max_length"), asked.key("ties"))
        return [ranking.size for ranking in rankings]
    from posttrain.evals import prompt_ids
    from posttrain.tools import with_tools

    told = with_tools(rows, asked.key("tools") or [], asked.key("tool_options"))
    return [len(prompt_ids(tokenizer, row)) for row in told]


def _small_model(tokenizer):
    """Takes the rows of new control tokens, which a template may add."""
    from posttrain.shapes import ShapeConfig, make_model

    return make_model(
        ShapeConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1), tokenizer
    )
