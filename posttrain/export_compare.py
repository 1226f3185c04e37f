"""Whether two engines compute the same model: log-probabilities along the same tokens, compared.

In:  traces, one a prompt: the prompt's token ids, the reference's greedy continuation and, before each of its tokens,
     the log-probabilities {token: log p} of an engine. Out: `Comparison` with its verdict and the first difference.
     Pure functions; the engines are run by check_export.py.
"""

import math
from dataclasses import dataclass, field

TOP = 8  # of the reference's tokens at a place these are compared ...
LEAST = math.log(0.01)  # ... if they are at least so likely; the likeliest always is compared

# Nats that the log p of a token may differ by from Hugging Face in fp32: the mean and the largest over all that are
# compared: some times what was measured on trained models (tiny GRPO 1 M, stories260k, SmolLM2 135 M: fp32 1e-4 in
# the mean, fp16 0.002, bf16 0.012, q8_0 0.11, where llama.cpp rounds activations to 8 bits, too). A wrong order of
# rotary rows moves them by nats.
TOLERANCES = {
    "F32": (0.002, 0.02),
    "F16": (0.01, 0.1),
    "BF16": (0.05, 0.5),
    "Q8_0": (0.25, 2.0),
}


@dataclass(frozen=True)
class Trace:
    """An engine on one prompt. `logps`: one dict a token of `tokens`, which the reference chose."""

    prompt: list[int]
    tokens: list[int]
    logps: list[dict[int, float]]


@dataclass
class Comparison:
    """An engine against the reference. `faults` is empty where it agrees; `dtype` None: no tolerance is known, and
    figures alone do not decide."""

    engine: str
    dtype: str | None = None
    prompts: int = 0
    positions: int = 0
    same: int = 0
    differences: list[float] = field(default_factory=list)
    worst: str = ""
    faults: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return sum(self.differences) / len(self.differences) if self.differences else 0.0

    @property
    def largest(self) -> float:
        return max(self.differences, default=0.0)

    @property
    def verdict(self) -> str:
        if self.faults:
            return "differs"
        return "agrees" if self.dtype in TOLERANCES else "no verdict"

    def as_dict(self) -> dict:
        """For JSON: figures and verdict."""
        return {
            "engine": self.engine, "dtype": self.dtype, "prompts": self.prompts, "positions": self.positions,
            "same_greedy_token": self.same, "mean_difference": _finite(self.mean),
            "largest_difference": _finite(self.largest),
            "tolerance": TOLERANCES.get(self.dtype), "verdict": self.verdict, "faults": self.faults,
            "remarks": self.remarks,
        }  # fmt: skip


def _finite(value: float) -> float | None:
    """JSON has no infinity: None where a likely token was not among the engine's likeliest."""
    return value if math.isfinite(value) else None


def compare(engine: str, dtype: str | None, reference: list[Trace], other: list[Trace], name) -> Comparison:
    """Compare traces on the same prompts. `name(token id)` gives the text that messages show.

    At each place the difference is |log p - log q| over the reference's likely tokens. The likeliest token may be
    another one only where the reference itself has the two closer than the tolerance.
    """
    found = Comparison(engine, dtype, len(reference))
    mean, largest = TOLERANCES.get(dtype, (math.inf, math.inf))
    for number, (ours, theirs) in enumerate(zip(reference, other, strict=True), 1):
        for place, (p, q) in enumerate(zip(ours.logps, theirs.logps, strict=True)):
            where = f"prompt {number}, token {place + 1} of the reply"
            best, chosen = max(p, key=p.get), max(q, key=q.get)
            found.positions += 1
            found.same += best == chosen
            margin = p[best] - p.get(chosen, -math.inf)
            if best != chosen and margin > largest:
                behind = f"{margin:.2f} nats behind" if margin < math.inf else "far behind"
                found.faults.append(f"{where}: Hugging Face takes {name(best)}, {engine} {name(chosen)} ({behind})")
            for token in likely(p):
                difference = abs(p[token] - q[token]) if token in q else math.inf
                if difference > found.largest:
                    found.worst = f"{where}: log p of {name(token)} is {p[token]:.3f}, in {engine} " + (
                        f"{q[token]:.3f}" if token in q else "not among its likeliest"
                    )
                found.differences.append(difference)
    if found.largest > largest:
        found.faults.append(f"log p differs by up to {found.largest:.3f} nats, expected {largest}: {found.worst}")
    if found.mean > mean:
        found.faults.append(f"log p differs by {found.mean:.4f} nats in the mean, expected {mean} at most")
    return found


def likely(logps: dict[int, float]) -> list[int]:
    """The tokens that are compared at one place, likeliest first."""
    ordered = sorted(logps, key=logps.get, reverse=True)[:TOP]
    return ordered[:1] + [token for token in ordered[1:] if logps[token] >= LEAST]


def table(rows: list[Comparison], tokens: int) -> str:
    """The engines, a line each. `tokens`: prompt tokens, equal for all."""
    lines = [
        f"{'engine':<8} {'dtype':<8} {'same greedy token':>18} {'|d log p|, mean':>16} {'largest':>9}  verdict",
        f"{'hf':<8} {'F32':<8} {f'{tokens} prompt tokens':>18} {'reference':>16}",
    ]
    for row in rows:
        same = f"{row.same} of {row.positions}"
        lines.append(
            f"{row.engine:<8} {row.dtype or '?':<8} {same:>18} {row.mean:>16.2g} {row.largest:>9.2g}  {row.verdict}"
        )
    return "\n".join(lines)
