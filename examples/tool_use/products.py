"""Tool use: a small model cannot multiply, but can call a calculator. SFT shows it calls, GRPO makes it choose them.

    accelerate launch recipes/sft.py --config examples/tool_use/sft.yaml
    accelerate launch recipes/grpo.py --config examples/tool_use/grpo.yaml

What came out: pass@1 on 90 held-out products 33.5 % [29.5, 37.4] after SFT, when about half of the replies call, and
83.6 % [81.0, 86.2] after 24 steps of GRPO, when 87 % of them do; the same model made to answer at once 0.1 % [0, 0.4].

In: tiny's sums, "What is 37+48?". Out: products, "What is 37*48?", as conversations to learn from (every other one
calls the calculator, the rest answer at once, as people do who know) or as problems. How to add a tool of your own
is in examples/word_count.py.
"""

import re
from collections.abc import Iterable, Iterator

from posttrain.tools import load_tools, schemas


def products(rows: Iterable[dict]) -> Iterator[tuple[str, int, int]]:
    """(question, a, b) of each row of tiny's `problems`."""
    for row in rows:
        question = row["prompt"][-1]["content"].replace("add", "multiply").replace("+", "*")
        a, b = map(int, re.findall(r"\d+", question))
        yield question, a, b


def problems(rows: Iterable[dict]) -> Iterator[dict]:
    """{"prompt", "answer"}: what GRPO samples from and both stages are measured on."""
    for question, a, b in products(rows):
        yield {"prompt": [{"role": "user", "content": question}], "answer": str(a * b)}


def conversations(rows: Iterable[dict]) -> Iterator[dict]:
    """{"messages", "tools"}: every other product by a call, the tool's answer and a reply, the rest at once."""
    told = schemas(load_tools(["calculator"]))
    for number, (question, a, b) in enumerate(products(rows)):
        messages = [{"role": "user", "content": question}]
        if number % 2:
            called = {"name": "calculator", "arguments": {"expression": f"{a}*{b}"}}
            messages.append(
                {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": called}]}
            )
            messages.append({"role": "tool", "name": "calculator", "content": str(a * b)})
        messages.append({"role": "assistant", "content": f"The answer is {a * b}."})
        yield {"messages": messages, "tools": told}
