r"""GSM8K rows -> problems with a checkable answer for RL, and worked solutions for SFT.

In: rows {"question": str, "answer": str}, the answer a worked solution with calculator marks `<<48/2=24>>` and a last
line `#### 72` (Cobbe et al. 2021, arXiv 2110.14168; the Hub's openai/gsm8k, config main).
Out: `gsm8k` yields {"prompt", "answer"}, `gsm8k_conversations` {"messages"}.

    problems = list(gsm8k(map(json.loads, open("train.jsonl"))))
"""

import re
from collections.abc import Iterable, Iterator

CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")


def gsm8k(rows: Iterable[dict]) -> Iterator[dict]:
    """Yield {"prompt": [{"role": "user", "content": question}], "answer": "1080"}: the final answer, commas removed.

    Raises:
        ValueError: a row without a question, or whose answer does not end in one "#### N".
    """
    for row in rows:
        question, _, final = _split(row)
        yield {"prompt": [{"role": "user", "content": question}], "answer": final}


def gsm8k_conversations(rows: Iterable[dict]) -> Iterator[dict]:
    """Yield {"messages": [user question, assistant worked solution]}; the solution ends in the line "#### 1080".

    The calculator marks are removed: at generation there is no calculator to write them.

    Raises:
        ValueError: as for `gsm8k`.
    """
    for row in rows:
        question, solution, final = _split(row)
        reply = f"{CALCULATOR_MARK.sub('', solution).strip()}\n#### {final}"
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}


def _split(row: dict) -> tuple[str, str, str]:
    """Return the question, the solution before "####", and the answer after it without commas."""
    for key in ("question", "answer"):
        if not isinstance(row.get(key), str):
            raise ValueError(f"{key!r} is {row.get(key)!r}, expected a string; keys: {sorted(row)}")
    solution, mark, final = row["answer"].rpartition("####")
    final = final.strip().replace(",", "")
    if not mark or not final or "####" in solution or not row["question"].strip():
        raise ValueError(
            f"expected a question and an answer that ends in one '#### N'; found question {row['question'][:80]!r}, "
            f"answer ending {row['answer'][-80:]!r}"
        )
    return row["question"].strip(), solution, final
