"""Forward passes of policy, reference and critic over completions, laid out without padding, a prompt once a group.

In: rollouts and the layout that the model can take (posttrain/layouts.py). Out: log-probabilities, entropies and
values of the sampled tokens alone: the head runs on their positions, so prompts cost no logits.
"""

import torch
from torch import Tensor, nn

from posttrain.layouts import Batch, Group, Layout, hidden_states
from posttrain.rl.logprobs import gather_logps, scaled_logits
from posttrain.rl.types import Rollouts


class PolicyForward(nn.Module):
    """A causal LM, with a value head on its trunk or without; a module so that DDP and FSDP can wrap it."""

    def __init__(self, model: nn.Module, value_head: nn.Module | None = None, entropy_gradient: bool = False):
        super().__init__()
        self.model, self.value_head, self.entropy_gradient = model, value_head, entropy_gradient

    def forward(self, batch: Batch, select: Tensor, targets: Tensor, temperature: float, head_alone: bool = False):
        """select, targets (M,): flat places and the tokens they predict. Returns log-probabilities (M,), entropies
        (M,) in nats and, with a value head, values (M,), all in fp32. `head_alone`: no gradient reaches the trunk."""
        hidden = hidden_states(self.model, batch)[select]
        hidden = hidden.detach() if head_alone else hidden
        logits = scaled_logits(self.model.get_output_embeddings()(hidden), self.model.config)
        values = None if self.value_head is None else self.value_head(hidden).float()[:, 0]
        return *gather_logps(logits, targets, temperature, self.entropy_gradient), values


class CriticForward(nn.Module):
    """A scalar-head model whose forward gives the value at selected places."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, select: Tensor) -> Tensor:
        """(M,) values in fp32."""
        return self.model.score(hidden_states(self.model, batch)[select]).float()[:, 0]


def by_group(rollouts: Rollouts, indices: list[int]) -> list[list[int]]:
    """Indices of completions, those of one prompt together, in their order."""
    groups: dict[int, list[int]] = {}
    for index in indices:
        groups.setdefault(index // rollouts.num_generations, []).append(index)
    return list(groups.values())


def sequences_of(rollouts: Rollouts, indices: list[int]) -> list[list[int]]:
    """Prompt and completion of each index, tools' answers included."""
    return [rollouts.prompt_ids[i] + rollouts.completions[i].ids for i in indices]


def split(rollouts: Rollouts, indices: list[int], layout: Layout, max_tokens: int) -> list[list[list[int]]]:
    """Micro-batches of at most `max_tokens` tokens (a longer group is cut, a longer completion stands alone): lists of
    groups of indices, each index once, long and short ones apart."""
    groups = by_group(rollouts, indices)
    sequences = dict(zip(indices, sequences_of(rollouts, indices), strict=True))

    def fits(part: list[int]) -> bool:
        return layout.tokens(Group([sequences[i] for i in part])) <= max_tokens

    parts: list[list[int]] = []
    for group in groups:
        part = group if fits(group) else []
        for index in group if not part else []:
            if part and not fits([*part, index]):
                parts.append(part)
                part = []
            part.append(index)
        parts.append(part)
    whole = [Group([sequences[i] for i in part]) for part in parts]
    return [[parts[p] for p in batch] for batch in layout.micro_batches(whole, max_tokens)]


def lay_out(rollouts: Rollouts, groups: list[list[int]], layout: Layout) -> tuple[Batch, Tensor, Tensor, list[int]]:
    """(batch, select (M,), targets (M,), sampled tokens of each completion) of groups of indices, in their order."""
    batch = layout.batch([sequences_of(rollouts, group) for group in groups])
    select, targets, sizes = [], [], []
    for number, index in enumerate(i for group in groups for i in group):
        completion, start = rollouts.completions[index], len(rollouts.prompt_ids[index]) - 1
        places, ids = batch.places(number, start, start + len(completion.ids)), torch.tensor(completion.ids)
        if completion.mask is not None:
            sampled = torch.tensor(completion.sampled, dtype=torch.long)
            places, ids = places[sampled], ids[sampled]
        select.append(places)
        targets.append(ids)
        sizes.append(len(ids))
    return batch, torch.cat(select), torch.cat(targets), sizes


@torch.no_grad()
def each_token(rollouts: Rollouts, layout: Layout, max_tokens: int, device, function) -> list[Tensor]:
    """N tensors (T_i,) on the CPU: what `function(batch, select, targets)` (M,) gives for each sampled token."""
    result: list[Tensor] = [torch.empty(0)] * len(rollouts.rows)
    for groups in split(rollouts, list(range(len(rollouts.rows))), layout, max_tokens):
        batch, select, targets, sizes = lay_out(rollouts, groups, layout)
        flat = function(batch.to(device), select.to(device), targets.to(device)).float().cpu()
        for index, piece in zip((i for group in groups for i in group), flat.split(sizes), strict=True):
            result[index] = piece
    return result


def rollout_logps(model, rollouts: Rollouts, layout: Layout, temperature: float, max_tokens: int) -> list[Tensor]:
    """Log-probabilities of the sampled tokens under `model`, N tensors (T_i,)."""
    forward = PolicyForward(model)

    def logps(batch, select, targets):
        return forward(batch, select, targets, temperature)[0]

    return each_token(rollouts, layout, max_tokens, model.device, logps)
