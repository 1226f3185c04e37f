"""Scores of K replies to one prompt from as few tokens as the model allows, without padding.

In: a scalar-head model and groups of token sequences (a ranking each). Out: each sequence's score, read at its last
token, equal to the plain padded forward up to rounding. Three layouts:
- prefix: what a group's sequences begin with stands once and its continuations side by side behind it; position ids
  go on from the common part and a 4D mask hides the continuations from each other (backends `sdpa` and `eager`);
- packed: whole sequences side by side (posttrain/packing.py);
- padded: one row a sequence, for backbones whose positions or states do not restart (ALiBi, state-space layers).
`find_layout` takes the first that gives the scores of the padded one on a probe.
"""

import inspect
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from posttrain.packing import best_fit, by_tokens, pack
from posttrain.ranking_rows import Ranking, shared_length

LAYOUTS = ("prefix", "packed", "padded")
MASKED_BACKENDS = ("sdpa", "eager")  # those that take a 4D mask as it is
NARROWEST = {"prefix": 128, "packed": 256}  # a row's width in tokens at least
# A query-key pair under a mask costs so many times its share of the arithmetic (a 0.8M Llama in fp32 on a CPU,
# forward and backward, widths of 128 ... 2048). Only the cut of long rankings depends on it, no score does.
ATTENTION_OVERHEAD = 2.0
# What one more forward and backward costs, in tokens: little on a CPU, much on a GPU, which waits for its kernels.
FORWARD_OVERHEAD = {"cpu": 128, "elsewhere": 8192}
BLOCKS = 12  # a micro-batch is cut at most at so many places


@dataclass(frozen=True)
class ScoreBatch:
    """B rows of S tokens with N sequences in them."""

    input_ids: Tensor  # (B, S)
    position_ids: Tensor | None  # (B, S)
    attention_mask: Tensor | None  # None, (B, S) or (B, 1, S, S); True = seen
    last: Tensor  # (N,) where each sequence ends in the flattened (B * S) tokens

    def to(self, device) -> "ScoreBatch":
        names = ("input_ids", "position_ids", "attention_mask", "last")
        values = {name: getattr(self, name) for name in names}
        return replace(self, **{name: v.to(device) for name, v in values.items() if v is not None})


@dataclass(frozen=True)
class Layout:
    """One of LAYOUTS, and what a query-key pair costs in units of a token's other arithmetic."""

    name: str
    attention_cost: float = 0.0
    forward_cost: float = FORWARD_OVERHEAD["cpu"]  # tokens

    def tokens(self, ranking: Ranking) -> int:
        """Tokens that a ranking adds to a forward, for filling micro-batches."""
        return ranking.size if self.name == "prefix" else sum(map(len, ranking.sequences))

    def micro_batches(self, rankings: list[Ranking], max_tokens: int) -> list[list[int]]:
        """Indices of rankings in micro-batches of at most `max_tokens` (a longer ranking stands alone), each index
        once. Short and long ones go apart where the narrower rows save more attention than a forward costs."""
        groups = by_tokens([self.tokens(ranking) for ranking in rankings], max_tokens)
        return [part for group in groups for part in self._cut(rankings, group)]

    def _cut(self, rankings: list[Ranking], group: list[int]) -> list[list[int]]:
        if not self.attention_cost or len(group) < 2:
            return [group]
        longest = {i: max(map(len, rankings[i].sequences)) for i in group}
        group = sorted(group, key=lambda i: (longest[i], i))
        edges = sorted({round(len(group) * k / BLOCKS) for k in range(BLOCKS + 1)})
        best: dict[int, tuple[float, list[list[int]]]] = {0: (0.0, [])}
        for place, end in enumerate(edges[1:], 1):
            width = max(NARROWEST[self.name], longest[group[end - 1]])
            ways = []
            for start in edges[:place]:
                tokens = sum(self.tokens(rankings[i]) for i in group[start:end])
                cost = best[start][0] + self.forward_cost + tokens * (1 + self.attention_cost * width)
                ways.append((cost, [*best[start][1], group[start:end]]))
            best[end] = min(ways, key=lambda way: way[0])
        return best[len(group)][1]

    def batch(self, groups: list[list[list[int]]]) -> ScoreBatch:
        """Lay out groups of sequences; `last` keeps their order."""
        if self.name == "prefix":
            return _prefix_batch(groups, self.attention_cost)
        sequences = [sequence for group in groups for sequence in group]
        return _packed_batch(sequences) if self.name == "packed" else _padded_batch(sequences)


class SequenceScores(nn.Module):
    """A scalar-head model whose forward gives the score at selected flat positions; a module so that DDP wraps it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: ScoreBatch) -> Tensor:
        """(N,) scores in fp32."""
        given = {"input_ids": batch.input_ids, "use_cache": False}
        if batch.position_ids is not None:
            given["position_ids"] = batch.position_ids
        if batch.attention_mask is not None:
            given["attention_mask"] = _for_backend(batch.attention_mask, self.model)
        output = getattr(self.model, self.model.base_model_prefix)(**given)
        hidden = output.last_hidden_state.flatten(0, 1)[batch.last]
        return self.model.score(hidden).float()[:, 0]


def _for_backend(mask: Tensor, model) -> Tensor:
    """Eager attention adds its mask to the logits; sdpa reads a boolean one."""
    if mask.ndim == 2 or model.config._attn_implementation != "eager":
        return mask
    return torch.where(mask, 0.0, torch.finfo(model.dtype).min).to(model.dtype)


def _packed_batch(sequences: list[list[int]]) -> ScoreBatch:
    packed = pack(sequences, capacity=max(NARROWEST["packed"], *map(len, sequences)))
    ends = [start + length - 1 for start, length in zip(packed.starts, packed.lengths, strict=True)]
    return ScoreBatch(packed.input_ids, packed.position_ids, None, torch.tensor(ends))


def _padded_batch(sequences: list[list[int]]) -> ScoreBatch:
    """Padded on the right with token 0, which nothing sees."""
    width = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
    mask = torch.tensor([[True] * len(s) + [False] * (width - len(s)) for s in sequences])
    return ScoreBatch(ids, None, mask, torch.tensor([row * width + len(s) - 1 for row, s in enumerate(sequences)]))


def _prefix_batch(groups: list[list[list[int]]], attention_cost: float) -> ScoreBatch:
    width, segments = _segments(groups, attention_cost)
    packed_rows = best_fit([size for *_, size in segments], width)
    rows, columns = len(packed_rows), max(sum(segments[i][2] for i in row) for row in packed_rows)
    ids, positions, segment_of, branch_of = (torch.zeros((rows, columns), dtype=torch.long) for _ in range(4))
    offsets = [0]
    for group in groups:
        offsets.append(offsets[-1] + len(group))
    last = torch.zeros(offsets[-1], dtype=torch.long)
    for row, members in enumerate(packed_rows):
        at = 0
        for number, index in enumerate(members, 1):
            group, chosen, size = segments[index]
            shared = shared_length(groups[group]) if len(chosen) > 1 else 0
            segment_of[row, at : at + size] = number
            pieces = [groups[group][chosen[0]][:shared], *(groups[group][k][shared:] for k in chosen)]
            for branch, piece in enumerate(pieces):
                end, start = at + len(piece), shared if branch else 0
                ids[row, at:end] = torch.tensor(piece, dtype=torch.long)
                positions[row, at:end] = torch.arange(start, start + len(piece))
                branch_of[row, at:end] = branch
                if branch:
                    last[offsets[group] + chosen[branch - 1]] = row * columns + end - 1
                at = end
        positions[row, at:] = torch.arange(columns - at)  # the tail is one more segment that nobody reads
    order = torch.arange(columns)
    seen = (segment_of[:, :, None] == segment_of[:, None, :]) & (order[None, :, None] >= order[None, None, :])
    seen &= (branch_of[:, None, :] == 0) | (branch_of[:, :, None] == branch_of[:, None, :])
    return ScoreBatch(ids, positions, seen[:, None], last)


def _segments(groups: list[list[list[int]]], attention_cost: float) -> tuple[int, list[tuple[int, list[int], int]]]:
    """(width of the rows, [(group, its members, tokens)]): each group whole, or cut into parts that repeat the prefix.

    A row's mask is dense, so its attention grows with the square of its width: many long continuations behind one
    prefix can cost more than the prefix saves. The width is the cheapest of a few, tokens * (1 + width * cost).
    """
    shared = [shared_length(group) for group in groups]
    own = [[len(s) - n for s in group] for group, n in zip(groups, shared, strict=True)]
    longest = max(NARROWEST["prefix"], *(len(s) for group in groups for s in group))
    whole = max(longest, *(n + sum(lengths) for n, lengths in zip(shared, own, strict=True)))
    best, width = None, float(longest)
    while True:
        capacity = min(int(width), whole)
        segments = [
            (index, members, shared[index] + sum(own[index][k] for k in members))
            for index in range(len(groups))
            for members in best_fit(own[index], capacity - shared[index])
        ]
        cost = sum(size for *_, size in segments) * (1 + attention_cost * capacity)
        if best is None or cost < best[0]:
            best = cost, capacity, segments
        if capacity == whole:
            return best[1:]
        width *= 1.4


def attention_cost(model) -> float:
    """What a query-key pair costs in units of a token's other arithmetic: 4 d L against 2 N (Kaplan 2001.08361)."""
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    embedding = model.get_input_embeddings().weight.numel()
    arithmetic = 2 * max(1, model.num_parameters() - embedding)
    return ATTENTION_OVERHEAD * 4 * head * config.num_attention_heads * config.num_hidden_layers / arithmetic


def find_layout(model, longest: int, wanted: tuple[str, ...] = LAYOUTS) -> tuple[Layout, str]:
    """(the first of `wanted` that the model can take, why it is not the very first, else "").

    `longest`: tokens of the longest sequence. Raises ValueError where the model can take none of them.
    Each layout must give the padded one's scores on a probe of random tokens, so that a backbone whose positions come
    from elsewhere (ALiBi, a recurrent state) is found out and not trained on leaks.
    """
    why = ""
    for name in wanted:
        reason = _obstacle(model, name, longest)
        if not reason:
            cost = 0.0 if name == "padded" else attention_cost(model)
            return Layout(name, cost, FORWARD_OVERHEAD["cpu" if model.device.type == "cpu" else "elsewhere"]), why
        why = why or reason
    raise ValueError(why)


def _obstacle(model, name: str, longest: int) -> str:
    """Why the model cannot take a layout; "" if it can."""
    if name == "padded":
        return ""
    backbone, config = getattr(model, model.base_model_prefix), model.config.get_text_config()
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        return f"{type(backbone).__name__} takes no position ids"
    if name == "prefix":
        backend = model.config._attn_implementation
        if backend not in MASKED_BACKENDS:
            return f"attention {backend} takes no mask of ours, only {' and '.join(MASKED_BACKENDS)} do"
        windows = [getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")]
        if any(window is not None and window < longest for window in windows):
            return f"its attention has a window narrower than {longest} tokens"
    gap, bound = _probe(model, Layout(name))
    return "" if gap <= bound else f"{name} scores differ from padded ones by {gap:.2g} on {type(backbone).__name__}"


@torch.no_grad()
def _probe(model, layout: Layout) -> tuple[float, float]:
    """(largest difference from the padded scores, what rounding may make)."""
    generator = torch.Generator().manual_seed(0)
    size = min(model.config.get_text_config().vocab_size, 30_000)
    prompt, *rest = (torch.randint(size, (n,), generator=generator).tolist() for n in (12, 5, 9, 2, 14, 3))
    groups = [[prompt + rest[0], prompt + rest[1], prompt + rest[2]], [rest[3], rest[4]]]
    scorer, training = SequenceScores(model), model.training
    model.eval()
    plain, found = (scorer(kind.batch(groups).to(model.device)) for kind in (Layout("padded"), layout))
    model.train(training)
    exact = model.dtype == torch.float32 and getattr(model.config, "quantization_config", None) is None
    rounding = 1e-3 if exact else 0.05
    return (plain - found).abs().max().item(), rounding * (1 + plain.abs().max().item())


@torch.no_grad()
def score_groups(model, groups: list[list[list[int]]], layout: Layout, max_tokens: int = 8192) -> list[list[float]]:
    """Scores of any number of groups under a scalar-head model, in eval mode, in their order."""
    training, scorer = model.training, SequenceScores(model)
    model.eval()
    rankings = [Ranking(group, [], index) for index, group in enumerate(groups)]
    scores: list[list[float]] = [[] for _ in groups]
    for indices in layout.micro_batches(rankings, max_tokens):
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
