"""Rows of tokens for a forward pass of K continuations of one prompt, from as few tokens as the model allows.

In: groups of token sequences (a ranking's replies, a prompt's completions). Out: a `Batch` whose hidden states are
those of the plain padded forward up to rounding. Three layouts:
- prefix: what a group's sequences begin with stands once and its continuations side by side behind it; position ids
  go on from the common part and a 4D mask hides the continuations from each other (backends `sdpa` and `eager`);
- packed: whole sequences side by side (posttrain/packing.py);
- padded: one row a sequence, for backbones whose positions or states do not restart (ALiBi, state-space layers).
`find_layout` takes the first that gives the hidden states of the padded one on a probe.
"""

import inspect
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from posttrain.errors import UserError
from posttrain.packing import best_fit, by_tokens, pack

LAYOUTS = ("prefix", "packed", "padded")
MASKED_BACKENDS = ("sdpa", "eager")  # those that take a 4D mask as it is
NARROWEST = {"prefix": 128, "packed": 256}  # a row's width in tokens at least
# A query-key pair under a mask costs so many times its share of the arithmetic (a 0.8M Llama in fp32 on a CPU,
# forward and backward, widths of 128 ... 2048). Only the cut of long rankings depends on it, no score does.
ATTENTION_OVERHEAD = 2.0
# What one more forward and backward costs, in tokens: little on a CPU, much on a GPU, which waits for its kernels.
FORWARD_OVERHEAD = {"cpu": 128, "elsewhere": 8192}
BLOCKS = 12  # a micro-batch is cut at most at so many places


@dataclass
class Group:
    """Sequences that begin alike."""

    sequences: list[list[int]]

    @cached_property
    def size(self) -> int:
        return shared_size(self.sequences)


@dataclass(frozen=True)
class Batch:
    """B rows of S tokens with N sequences in them. A sequence stands in two pieces: the first `shared` tokens, which
    others may have, too, at `prefix`, the rest at `own` (flat places in the B * S tokens)."""

    input_ids: Tensor  # (B, S)
    position_ids: Tensor | None  # (B, S)
    attention_mask: Tensor | None  # None, (B, S) or (B, 1, S, S); True = seen
    spans: list[tuple[int, int, int]]  # N of (prefix, shared, own)
    last: Tensor  # (N,) where each sequence ends

    def places(self, index: int, start: int, stop: int) -> Tensor:
        """Flat places of tokens start ... stop - 1 of a sequence, (stop - start,)."""
        prefix, shared, own = self.spans[index]
        tokens = torch.arange(start, stop)
        return torch.where(tokens < shared, prefix + tokens, own + tokens - shared)

    def to(self, device) -> "Batch":
        names = ("input_ids", "position_ids", "attention_mask", "last")
        values = {name: getattr(self, name) for name in names}
        return replace(self, **{name: v.to(device) for name, v in values.items() if v is not None})


@dataclass(frozen=True)
class Layout:
    """One of LAYOUTS, and what a query-key pair costs in units of a token's other arithmetic."""

    name: str
    attention_cost: float = 0.0
    forward_cost: float = FORWARD_OVERHEAD["cpu"]  # tokens

    def tokens(self, group: Group) -> int:
        """Tokens that a group adds to a forward, for filling micro-batches."""
        return group.size if self.name == "prefix" else sum(map(len, group.sequences))

    def micro_batches(self, groups: list[Group], max_tokens: int) -> list[list[int]]:
        """Indices of groups in micro-batches of at most `max_tokens` (a longer group stands alone), each index
        once. Short and long ones go apart where the narrower rows save more attention than a forward costs."""
        parts = by_tokens([self.tokens(group) for group in groups], max_tokens)
        return [piece for part in parts for piece in self._cut(groups, part)]

    def _cut(self, groups: list[Group], part: list[int]) -> list[list[int]]:
        if not self.attention_cost or len(part) < 2:
            return [part]
        longest = {i: max(map(len, groups[i].sequences)) for i in part}
        part = sorted(part, key=lambda i: (longest[i], i))
        edges = sorted({round(len(part) * k / BLOCKS) for k in range(BLOCKS + 1)})
        before = [0, *accumulate(self.tokens(groups[i]) for i in part)]  # tokens of the first so many groups
        best: dict[int, tuple[float, list[list[int]]]] = {0: (0.0, [])}
        for place, end in enumerate(edges[1:], 1):
            width = max(NARROWEST[self.name], longest[part[end - 1]])
            ways = []
            for start in edges[:place]:
                tokens = before[end] - before[start]
                cost = best[start][0] + self.forward_cost + tokens * (1 + self.attention_cost * width)
                ways.append((cost, [*best[start][1], part[start:end]]))
            best[end] = min(ways, key=lambda way: way[0])
        return best[len(part)][1]

    def batch(self, groups: list[list[list[int]]]) -> Batch:
        """Lay out groups of sequences; `last` keeps their order."""
        if self.name == "prefix":
            return _prefix_batch(groups, self.attention_cost)
        sequences = [sequence for group in groups for sequence in group]
        return _packed_batch(sequences) if self.name == "packed" else _padded_batch(sequences)


def shared_length(sequences: list[list[int]]) -> int:
    """Tokens that all sequences begin with (the prompt, and more where replies begin alike); each keeps at least its
    last token to itself, since that is where its score is read. One sequence shares nothing."""
    if len(sequences) < 2:
        return 0
    first, last = min(sequences), max(sequences)  # in the order of lists these differ the soonest
    most = min(map(len, sequences)) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


def shared_size(sequences: list[list[int]]) -> int:
    """Tokens of a group where those that all begin with stand once."""
    shared = shared_length(sequences)
    return shared + sum(len(s) - shared for s in sequences)


def hidden_states(model, batch: Batch) -> Tensor:
    """Last hidden states of a causal LM's or a scalar-head model's backbone, (B * S, D)."""
    given = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.position_ids is not None:
        given["position_ids"] = batch.position_ids
    if batch.attention_mask is not None:
        given["attention_mask"] = _for_backend(batch.attention_mask, model)
    return getattr(model, model.base_model_prefix)(**given).last_hidden_state.flatten(0, 1)


def _for_backend(mask: Tensor, model) -> Tensor:
    """Eager attention adds its mask to the logits; sdpa reads a boolean one."""
    if mask.ndim == 2 or model.config._attn_implementation != "eager":
        return mask
    return torch.where(mask, 0.0, torch.finfo(model.dtype).min).to(model.dtype)


def _packed_batch(sequences: list[list[int]]) -> Batch:
    packed = pack(sequences, capacity=max(NARROWEST["packed"], *map(len, sequences)))
    ends = [start + length - 1 for start, length in zip(packed.starts, packed.lengths, strict=True)]
    spans = [(start, 0, start) for start in packed.starts]
    return Batch(packed.input_ids, packed.position_ids, None, spans, torch.tensor(ends))


def _padded_batch(sequences: list[list[int]]) -> Batch:
    """Padded on the right with token 0, which nothing sees."""
    width = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences])
    mask = torch.tensor([[True] * len(s) + [False] * (width - len(s)) for s in sequences])
    spans = [(row * width, 0, row * width) for row in range(len(sequences))]
    return Batch(ids, None, mask, spans, torch.tensor([row * width + len(s) - 1 for row, s in enumerate(sequences)]))


def _prefix_batch(groups: list[list[list[int]]], attention_cost: float) -> Batch:
    width, segments = _segments(groups, attention_cost)
    packed_rows = best_fit([size for *_, size in segments], width)
    rows, columns = len(packed_rows), max(sum(segments[i][2] for i in row) for row in packed_rows)
    ids, positions, segment_of, branch_of = (torch.zeros((rows, columns), dtype=torch.long) for _ in range(4))
    offsets = [0]
    for group in groups:
        offsets.append(offsets[-1] + len(group))
    spans, ends = [(0, 0, 0)] * offsets[-1], [0] * offsets[-1]
    for row, members in enumerate(packed_rows):
        at = 0
        for number, index in enumerate(members, 1):
            group, chosen, size = segments[index]
            prefix = row * columns + at
            shared = shared_length(groups[group]) if len(chosen) > 1 else 0
            segment_of[row, at : at + size] = number
            pieces = [groups[group][chosen[0]][:shared], *(groups[group][k][shared:] for k in chosen)]
            for branch, piece in enumerate(pieces):
                end, start = at + len(piece), shared if branch else 0
                ids[row, at:end] = torch.tensor(piece, dtype=torch.long)
                positions[row, at:end] = torch.arange(start, start + len(piece))
                branch_of[row, at:end] = branch
                if branch:
                    sequence = offsets[group] + chosen[branch - 1]
                    spans[sequence], ends[sequence] = (prefix, shared, row * columns + at), row * columns + end - 1
                at = end
        positions[row, at:] = torch.arange(columns - at)  # the tail is one more segment that nobody reads
    order = torch.arange(columns)
    seen = (segment_of[:, :, None] == segment_of[:, None, :]) & (order[None, :, None] >= order[None, None, :])
    seen &= (branch_of[:, None, :] == 0) | (branch_of[:, :, None] == branch_of[:, None, :])
    return Batch(ids, positions, seen[:, None], spans, torch.tensor(ends))


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


def head_size(config) -> int:
    """Numbers of one attention head, from a model's text config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention_cost(model) -> float:
    """What a query-key pair costs in units of a token's other arithmetic: 4 d L against 2 N (Kaplan 2001.08361)."""
    config = model.config.get_text_config()
    head = head_size(config)
    embedding = model.get_input_embeddings().weight.numel()
    arithmetic = 2 * max(1, model.num_parameters() - embedding)
    return ATTENTION_OVERHEAD * 4 * head * config.num_attention_heads * config.num_hidden_layers / arithmetic


def find_layout(model, longest: int, wanted: tuple[str, ...] = LAYOUTS) -> tuple[Layout, str]:
    """(the first of `wanted` that the model can take, why it is not the very first, else "").

    `longest`: tokens of the longest sequence. Raises ValueError where the model can take none of them.
    Each layout must give the padded one's hidden states on a probe of random tokens: a backbone whose positions come
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


def common_layout(models: list, longest: int, wanted: tuple[str, ...]) -> tuple[Layout, str]:
    """`find_layout` for several models together: the first of `wanted` that all can take. UserError where none."""
    asked, why = wanted, ""
    for model in models:
        try:
            layout, reason = find_layout(model, longest, wanted)
        except ValueError as error:
            raise UserError(f"layout: {asked[0]}, but {error}; --layout auto takes the next best one") from error
        wanted, why = wanted[wanted.index(layout.name) :], why or reason
    return layout, why


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
    return "" if gap <= bound else f"{name} rows differ from padded ones by {gap:.2g} on {type(backbone).__name__}"


@torch.no_grad()
def _probe(model, layout: Layout) -> tuple[float, float]:
    """(largest difference from the padded hidden states, what rounding may make)."""
    generator = torch.Generator().manual_seed(0)
    size = min(model.config.get_text_config().vocab_size, 30_000)
    prompt, *rest = (torch.randint(size, (n,), generator=generator).tolist() for n in (12, 5, 9, 2, 14, 3))
    groups = [[prompt + rest[0], prompt + rest[1], prompt + rest[2]], [rest[3], rest[4]]]
    training = model.training
    model.eval()
    batches = [kind.batch(groups).to(model.device) for kind in (Layout("padded"), layout)]
    plain, found = (hidden_states(model, batch)[batch.last].float() for batch in batches)
    model.train(training)
    exact = model.dtype == torch.float32 and getattr(model.config, "quantization_config", None) is None
    rounding = 1e-3 if exact else 0.05
    return (plain - found).abs().max().item(), rounding * (1 + plain.abs().max().item())
