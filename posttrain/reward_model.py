"""A reward model from rankings: one scalar for a prompt with a reply, learned from orders of K replies.

In: rows `prompt`, `completions` best to worst with `ranks` (equal ranks are ties), or `prompt`, `chosen`, `rejected`.
Out: a scalar-head model that `AutoModelForSequenceClassification` loads. Launched by
`accelerate launch recipes/reward.py --config recipes/tiny/reward.yaml`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.args import arg, at_least
from posttrain.chat import control_tokens, encode_chat, reply_end_id, stop_ids
from posttrain.data import MESSAGES, are_messages
from posttrain.errors import UserError
from posttrain.order import shuffled_indices
from posttrain.packing import by_tokens, pack
from posttrain.progress import Progress
from posttrain.rl.logprobs import TokenValues
from posttrain.training import OptimConfig, Updater, read_state, require_multiple, write_state

LOSSES = ("plackett_luce", "bradley_terry")


@dataclass
class RewardConfig:
    """Reward model: loss and batches"""

    loss_type: str = arg(
        "plackett_luce", help="plackett_luce: the whole order; bradley_terry: all its pairs, averaged"
    )
    max_steps: int = arg(300, help="optimizer steps")
    batch_size: int = arg(32, help="rankings of a step, over all processes")
    max_length: int = arg(256, help="longest prompt with reply, in tokens; longer ones are left out and counted")
    max_tokens_per_microbatch: int = arg(8192, help="tokens of one forward and backward; memory, not mathematics")

    def __post_init__(self):
        if self.loss_type not in LOSSES:
            raise UserError(f"loss_type: found {self.loss_type!r}, expected one of {', '.join(LOSSES)}")
        at_least(self, max_steps=1, batch_size=1, max_length=2, max_tokens_per_microbatch=1)


@dataclass
class Ranking:
    """K encoded replies with their prompt, best to worst."""

    sequences: list[list[int]]
    ranks: list[int]  # non-decreasing; equal = tie
    row: int


def encode_rankings(tokenizer, rows: list[dict], max_length: int) -> tuple[list[Ranking], int]:
    """(rankings, number left out as too long). UserError naming the row where a ranking is malformed.

    A sequence ends with the token that closes the reply: a sampled reply has none of what a template puts after it.
    """
    rankings, too_long, end = [], 0, reply_end_id(tokenizer)
    for index, row in enumerate(rows):
        completions = row.get("completions") or [row[key] for key in ("chosen", "rejected") if key in row]
        ranks = row.get("ranks") or list(range(len(completions)))
        if len(completions) < 2 or len(ranks) != len(completions) or sorted(ranks) != list(ranks):
            raise UserError(
                f"row {index}: {len(completions)} completions with ranks {ranks}; expected two or more completions, "
                "best first, with as many ranks in rising order (equal = tie)"
            )
        for messages in (row["prompt"], *completions):
            if not are_messages(messages):
                raise UserError(f"row {index}: found {str(messages)[:80]!r}, expected {MESSAGES}")
        sequences = [encode_chat(tokenizer, [*row["prompt"], *reply]).input_ids for reply in completions]
        sequences = [ids[: len(ids) - ids[::-1].index(end)] if end in ids else ids for ids in sequences]
        if max(map(len, sequences)) > max_length:
            too_long += 1
        else:
            rankings.append(Ranking(sequences, list(ranks), index))
    if not rankings:
        raise UserError(f"all {len(rows)} rankings have a reply longer than max_length {max_length} tokens: raise it")
    return rankings, too_long


def plackett_luce_loss(scores: Tensor, ranks: list[int]) -> Tensor:
    """-log likelihood of an order (Plackett 1975): sum over places of logsumexp(scores still in the race) - score.

    scores (K,), best first. The last place, where one is left, adds 0. Within a tie every member is held against all
    that are not better (Breslow 1974), so the order of tied replies does not matter. K = 2 is the Bradley-Terry loss.
    """
    total = scores.new_zeros(())
    for place, rank in enumerate(ranks):
        race = scores[ranks.index(rank) :]
        if len(race) > 1:
            total = total + torch.logsumexp(race, 0) - scores[place]
    return total


def bradley_terry_loss(scores: Tensor, ranks: list[int]) -> Tensor:
    """Mean over pairs of different ranks of -log sigmoid(better - worse) (InstructGPT, 2203.02155); scores (K,)."""
    pairs = [(i, j) for i in range(len(ranks)) for j in range(i + 1, len(ranks)) if ranks[i] < ranks[j]]
    if not pairs:
        return scores.sum() * 0.0
    better, worse = (torch.tensor(side, device=scores.device) for side in zip(*pairs, strict=True))
    return -torch.nn.functional.logsigmoid(scores[better] - scores[worse]).mean()


LOSS_FUNCTIONS = {"plackett_luce": plackett_luce_loss, "bradley_terry": bradley_terry_loss}


def score_sequences(scorer: torch.nn.Module, sequences: list[list[int]], device) -> Tensor:
    """(N,) scores read at each sequence's last token, from one packed forward."""
    packed = pack(sequences, capacity=max(256, *map(len, sequences)))
    last = torch.tensor([start + length - 1 for start, length in zip(packed.starts, packed.lengths, strict=True)])
    packed = packed.to(device)
    return scorer(packed.input_ids, packed.position_ids, last.to(device))


@torch.no_grad()
def score_all(model, sequences: list[list[int]], max_tokens: int = 8192) -> list[float]:
    """Scores of any number of sequences under a scalar-head model, in eval mode, in their order."""
    was_training, scorer = model.training, TokenValues(model)
    model.eval()
    scores = [0.0] * len(sequences)
    for batch in by_tokens([len(s) for s in sequences], max_tokens):
        values = score_sequences(scorer, [sequences[i] for i in batch], model.device)
        for index, value in zip(batch, values.tolist(), strict=True):
            scores[index] = value
    model.train(was_training)
    return scores


def score_rankings(model, rankings: list[Ranking]) -> list[list[float]]:
    """Scores of each ranking's replies, best-ranked first."""
    flat = iter(score_all(model, [s for ranking in rankings for s in ranking.sequences]))
    return [[next(flat) for _ in ranking.sequences] for ranking in rankings]


def init_head(model) -> None:
    """Scalar head drawn from N(0, 1 / (d + 1)) (Stiennon et al. 2009.01325), so that first scores are of order 1."""
    torch.nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.config.hidden_size + 1))


def set_pad(model, tokenizer) -> None:
    """Give both a pad token that ends no reply: transformers reads a score at the last token that is not the pad."""
    ends = stop_ids(tokenizer)
    choices = [tokenizer.pad_token_id, tokenizer.unk_token_id, *sorted(control_tokens(tokenizer))]
    pad = next((i for i in choices if i is not None and i not in ends), None)
    model.config.pad_token_id = pad
    if pad is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)


def train(stage, accelerator, model, rankings: list[Ranking], config: RewardConfig, optim: OptimConfig) -> int:
    """Train `model` in place; returns the number of tokens seen."""
    model.train()
    updater = Updater(TokenValues(model), accelerator, optim, config.max_steps)
    loss_function = LOSS_FUNCTIONS[config.loss_type]
    step, tokens = 0, 0
    if stage.resume_folder is not None:
        from safetensors.torch import load_model

        load_model(model, stage.resume_folder / "model.safetensors")
        state = read_state(stage.resume_folder)
        updater.load_state(state["updater"])
        step, tokens = state["step"], state["tokens"]

    def share(batch: list[Ranking]):
        sequences = [s for ranking in batch for s in ranking.sequences]
        scores = score_sequences(updater.model, sequences, accelerator.device)
        pieces = scores.split([len(ranking.sequences) for ranking in batch])
        losses = [loss_function(piece, ranking.ranks) for piece, ranking in zip(pieces, batch, strict=True)]
        return torch.stack(losses).sum() / config.batch_size

    progress = Progress(stage.name, config.max_steps, initial=step)
    rank, world = accelerator.process_index, accelerator.num_processes
    require_multiple(config, "batch_size", world)
    with stage.running():
        while step < config.max_steps and not stage.stopping:
            taken = shuffled_indices(step, config.batch_size, len(rankings), stage.config["seed"])
            tokens += sum(len(s) for i in taken for s in rankings[i].sequences)
            batch = [rankings[i] for i in taken[rank::world]]
            sizes = [sum(map(len, ranking.sequences)) for ranking in batch]
            groups = [[batch[i] for i in group] for group in by_tokens(sizes, config.max_tokens_per_microbatch)]

            def rows(batch=batch) -> str:
                return ", ".join(str(ranking.row) for ranking in batch[:8])

            numbers = updater.step(groups, share, rows)
            step += 1
            progress.update(loss=numbers["loss"])
            if step % stage.config["logging_steps"] == 0 or step == config.max_steps:
                stage.log(step, **numbers, tokens=tokens)
            if stage.due(step, config.max_steps):
                stage.save(step, lambda f, step=step, tokens=tokens: _write(f, model, updater, step, tokens))
    progress.close()
    return tokens


def _write(folder, model, updater: Updater, step: int, tokens: int) -> None:
    model.save_pretrained(folder)
    write_state(folder, updater=updater.state(), step=step, tokens=tokens)
