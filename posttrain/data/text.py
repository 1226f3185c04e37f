"""Documents under whatever column -> {"text"}, for pretraining.

In: rows with a column of text. Out: rows {"text": str}. In a YAML: `dataset_adapter: plain_text`,
`dataset_adapter_options: {column: content}`.
"""

from collections.abc import Iterable, Iterator

from posttrain.data.fields import adapt, text


def plain_text(rows: Iterable[dict], *, column: str = "text", bad=None) -> Iterator[dict]:
    """Yield {"text": the row's text under `column`, as it is}.

    Raises:
        ValueError: a row whose column is missing, no string, or blank (with `bad`: as its policy says).
    """
    return adapt(rows, lambda row: {"text": text(row, column)}, bad)
