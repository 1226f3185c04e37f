"""A reward model from rankings: one scalar for a prompt with a reply, learned from orders of K replies.

In: rows `prompt`, `completions` best to worst with `ranks` (equal ranks are ties), or `prompt`, `chosen`, `rejected`.
Out: a scalar-head model that `AutoModelForSequenceClassification` loads. Launched by
`accelerate launch recipes/reward.py --config recipes/tiny/reward.yaml`.
"""

import hashlib
import math
from dataclasses import dataclass

import torch

from posttrain.args import arg, at_least, one_of
from posttrain.chat import control_tokens, stop_ids
from posttrain.data import origin
from posttrain.early_stopping import EarlyStopping
from posttrain.errors import UserError
from posttrain.layouts import LAYOUTS, Layout, common_layout
from posttrain.lora import LoraArgs, add_adapter
from posttrain.order import shuffled_indices
from posttrain.progress import Progress
from posttrain.ranking_forward import SequenceScores
from posttrain.ranking_losses import LOSS_FUNCTIONS, TIES, RankingLoss
from posttrain.ranking_rows import Ranking
from posttrain.sharding import full_trained, gathered, load_trained, unshard
from posttrain.training import OptimConfig, Updater, read_state, require_multiple, write_state


@dataclass
class RewardConfig:
    """Reward model: loss and batches"""

    loss_type: str = arg(
        "plackett_luce",
        help="plackett_luce: the whole order; bradley_terry: all its pairs, averaged; top1: the best against the rest",
    )
    ties: str = arg("average", help="plackett_luce's ties: average over their orders, or breslow (cheap, approximate)")
    label_smoothing: float = arg(0.0, help="chance that a choice was an error; below 0.5")
    center_rewards_coefficient: float = arg(0.0, help="weight of (2 x a ranking's mean score)^2, which centres scores")
    layout: str = arg(
        "auto", help="prefix: a prompt's tokens once for its K replies; packed; padded; auto: what the model can take"
    )
    max_steps: int = arg(300, help="optimizer steps")
    batch_size: int = arg(32, help="rankings of a step, over all processes")
    max_length: int = arg(256, help="longest prompt with reply, in tokens; longer ones are left out and counted")
    max_tokens_per_microbatch: int = arg(8192, help="tokens of one forward and backward; memory, not mathematics")
    eval_steps: int = arg(0, help="measure the validation loss every so many steps, to stop early; 0 = never")
    early_stopping_patience: int = arg(3, help="stop after so many evaluations without a lower validation loss")
    validation_share: float = arg(0.1, help="with eval_steps: share of the training prompts kept for that loss alone")

    def __post_init__(self):
        one_of(self, loss_type=LOSS_FUNCTIONS, ties=TIES, layout=("auto", *LAYOUTS))
        for key, bound in {"label_smoothing": 0.5, "center_rewards_coefficient": math.inf}.items():
            if not 0 <= getattr(self, key) < bound:
                raise UserError(f"{key}: found {getattr(self, key)}, expected 0 or more and less than {bound}")
        if not 0 < self.validation_share < 1:
            raise UserError(f"validation_share: found {self.validation_share}, expected more than 0 and less than 1")
        least = {"max_steps": 1, "batch_size": 1, "max_length": 2, "max_tokens_per_microbatch": 1}
        at_least(self, **least, eval_steps=0, early_stopping_patience=1)

    def layouts(self) -> tuple[str, ...]:
        """Those to try, in this order."""
        return LAYOUTS if self.layout == "auto" else (self.layout,)

    def loss(self) -> RankingLoss:
        return RankingLoss(self.loss_type, self.ties, self.label_smoothing, self.center_rewards_coefficient)


@dataclass(frozen=True)
class Trained:
    """What a training run did; `best_step` is None where nothing was stopped early."""

    tokens: int
    step: int
    best_step: int | None


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


def choose_layout(stage, model, rankings: list[Ranking], config: RewardConfig) -> Layout:
    """The layout that `layout` asks for. UserError where the model cannot take it; `stage` is told of a fall-back."""
    longest = max(len(s) for ranking in rankings for s in ranking.sequences)
    layout, why = common_layout([model], longest, config.layouts())
    if why:
        stage.note(f"scores come from the {layout.name} layout: {why}")
    return layout


def prepare(model, tokenizer, lora: LoraArgs):
    """Draw the head and choose the pad; with use_peft put adapters inside. Returns what is to be saved."""
    init_head(model)
    set_pad(model, tokenizer)
    return add_adapter(model, lora, task_type="SEQ_CLS") if lora.use_peft else model


def split_validation(
    rankings: list[Ranking], rows: list[dict], config: RewardConfig
) -> tuple[list[Ranking], list[Ranking]]:
    """(to learn from, to stop by): whole prompts, taken by the hash of their first user turn, so that neither seed
    nor order matters; without eval_steps all of them are learned from. UserError where either side is empty."""
    share = config.validation_share
    if not config.eval_steps:
        return rankings, []

    def draw(ranking: Ranking) -> float:
        key = f"validation {origin(rows[ranking.row])}"
        return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 16**8

    held = [draw(ranking) < share for ranking in rankings]
    parts = [[r for r, out in zip(rankings, held, strict=True) if out == side] for side in (False, True)]
    if not all(parts):
        raise UserError(
            f"validation_share: {share} of {len(rankings)} rankings leaves {len(parts[0])} to learn from and "
            f"{len(parts[1])} to stop by; take another share, or eval_steps 0"
        )
    return parts[0], parts[1]


def train(
    stage, accelerator, model, rankings: list[Ranking], config: RewardConfig, optim: OptimConfig, validation=()
) -> Trained:
    """Train `model` in place; with eval_steps and `validation` rankings it ends with the weights that were best there.

    Deterministic in the stage's seed, and bit-equal on a CPU however often it is interrupted and resumed.
    """
    model.train()
    layout = choose_layout(stage, model, rankings, config)
    updater = Updater(SequenceScores(model), accelerator, optim, config.max_steps)
    stopper = EarlyStopping(model, config.early_stopping_patience)
    step, tokens = _resume(stage, model, updater, stopper) if stage.resume_folder is not None else (0, 0)
    rank, world, loss = accelerator.process_index, accelerator.num_processes, config.loss()
    require_multiple(config, "batch_size", world)

    def share(batch: list[Ranking]):
        return batch_losses(updater.model, batch, layout, loss, accelerator.device).sum() / config.batch_size

    progress = Progress(stage.name, config.max_steps, initial=step)
    with stage.running():
        while step < config.max_steps and not stopper.done and not stage.stopping:
            taken = shuffled_indices(step, config.batch_size, len(rankings), stage.config["seed"])
            tokens += sum(len(s) for i in taken for s in rankings[i].sequences)
            batch = [rankings[i] for i in taken[rank::world]]
            parts = layout.micro_batches(batch, config.max_tokens_per_microbatch)
            groups = [[batch[i] for i in part] for part in parts]

            def rows(batch=batch) -> str:
                return ", ".join(str(ranking.row) for ranking in batch[:8])

            numbers = updater.step(groups, share, rows)
            step += 1
            progress.update(loss=numbers["loss"])
            if config.eval_steps and validation and (step % config.eval_steps == 0 or step == config.max_steps):
                with gathered(updater.model):
                    numbers["eval_loss"] = mean_loss(model, validation, layout, accelerator, config)
                stopper.see(step, numbers["eval_loss"])
            if step % stage.config["logging_steps"] == 0 or step == config.max_steps or "eval_loss" in numbers:
                stage.log(step, **numbers, tokens=tokens)
            if stage.due(step, step if stopper.done else config.max_steps):
                parts = {"updater": updater.state(), "step": step, "tokens": tokens, "stopping": stopper.state()}
                weights = full_trained(model)
                stage.save(step, lambda folder, kept=(weights, parts): _write(folder, stopper, *kept))
    progress.close()
    unshard(updater.model)
    stopper.restore()
    if stopper.done:
        stage.note(f"stopped at step {step}: the validation loss was lowest at step {stopper.best_step}")
    return Trained(tokens, step, stopper.best_step or None)


def batch_losses(scorer, batch: list[Ranking], layout: Layout, loss: RankingLoss, device) -> torch.Tensor:
    """(rankings,) losses from one forward."""
    scores = scorer(layout.batch([ranking.sequences for ranking in batch]).to(device))
    pieces = scores.split([len(ranking.sequences) for ranking in batch])
    return torch.stack([loss(piece, r.ranks, r.margins) for piece, r in zip(pieces, batch, strict=True)])


@torch.no_grad()
def mean_loss(model, rankings: list[Ranking], layout: Layout, accelerator, config: RewardConfig) -> float:
    """Mean -log likelihood of rankings over all processes, each taking its share; without smoothing and centering.

    `model` is the bare one: a DDP module would have its processes wait for each other's micro-batches.
    """
    scorer = SequenceScores(model).eval()
    mine = rankings[accelerator.process_index :: accelerator.num_processes]
    plain, total = RankingLoss(config.loss_type, config.ties), torch.zeros((), device=accelerator.device)
    for group in layout.micro_batches(mine, config.max_tokens_per_microbatch):
        with accelerator.autocast():
            total += batch_losses(scorer, [mine[i] for i in group], layout, plain, accelerator.device).sum()
    scorer.train()
    return accelerator.reduce(total, "sum").item() / len(rankings)


def _write(folder, stopper: EarlyStopping, weights: dict, parts: dict) -> None:
    from safetensors.torch import save_file

    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    stopper.save(folder)
    write_state(folder, **parts)


def _resume(stage, model, updater: Updater, stopper: EarlyStopping) -> tuple[int, int]:
    from safetensors.torch import load_file

    weights = load_file(stage.resume_folder / "model.safetensors")
    load_trained(model, weights)
    state = read_state(stage.resume_folder)
    updater.load_state(state["updater"])
    stopper.load(stage.resume_folder, state["stopping"])
    return state["step"], state["tokens"]
