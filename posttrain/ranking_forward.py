"""Scores of K replies to one prompt, from as few tokens as the model allows (posttrain/layouts.py).

In: a scalar-head model and groups of token sequences (a ranking each). Out: each sequence's score, read at its last
token, equal to the plain padded forward up to rounding.
"""

import torch
from torch import Tensor, nn

from posttrain.layouts import Batch, Group, Layout, find_layout, hidden_states  # noqa: F401
from posttrain.ranking_rows import Ranking


class SequenceScores(nn.Module):
    """A scalar-head model whose forward gives each sequence's score; a module so that DDP wraps it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> Tensor:
        """(N,) scores in fp32."""
        return self.model.score(hidden_states(self.model, batch)[batch.last]).float()[:, 0]


@torch.no_grad()
def score_groups(model, groups: list[list[list[int]]], layout: Layout, max_tokens: int = 8192) -> list[list[float]]:
    """Scores of any number of groups under a scalar-head model, in eval mode, in their order."""
    training, scorer = model.training, SequenceScores(model)
    model.eval()
    scores: list[list[float]] = [[] for _ in groups]
    for indices in layout.micro_batches([Group(group) for group in groups], max_tokens):
        values = iter(scorer(layout.batch([groups[i] for i in indices]).to(model.device)).tolist())
        for index in indices:
            scores[index] = [next(values) for _ in groups[index]]
    model.train(training)
    return scores


def score_all(model, sequences: list[list[int]], max_tokens: int = 8192, layout: Layout | None = None) -> list[float]:
    """Scores of sequences that share nothing, packed unless another layout is given."""
    layout = layout or Layout("packed")
    return [score for [score] in score_groups(model, [[s] for s in sequences], layout, max_tokens)]


def score_rankings(model, rankings: list[Ranking], layout: Layout | None = None) -> list[list[float]]:
    """Scores of each ranking's replies, best-ranked first."""
    return score_groups(model, [r.sequences for r in rankings], layout or Layout("packed"))
