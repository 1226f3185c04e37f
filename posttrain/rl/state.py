"""What a resumed RL run needs: weights that are trained, optimizers, the place among the prompts, rollouts in flight.

In: an `RLTrainer` between two steps. Out: a checkpoint's folder, and back; bit-equal on a CPU.
"""

from safetensors.torch import load_file, save_file

from posttrain.errors import UserError
from posttrain.sharding import full_trained, load_trained
from posttrain.training import read_state, write_state

WEIGHTS, CRITIC = "policy.safetensors", "critic.safetensors"


def save(trainer) -> None:
    """Checkpoint the trainer's step; every process calls it, the main one writes."""
    from accelerate.utils import gather_object

    _write(trainer, gather_object([trainer.collector.state()]))


def save_alone(trainer) -> None:
    """The same without the other processes, which wait elsewhere: nothing may be in flight. Not where weights are
    sharded, for no process has them all."""
    if trainer.policy_updater.sharded:
        trainer.stage.note("no checkpoint of this step: its weights are sharded, and the processes have parted")
    else:
        _write(trainer, [trainer.collector.state()] * trainer.accelerator.num_processes)


def _write(trainer, collectors: list[dict]) -> None:
    networks = {WEIGHTS: full_trained(trainer.policy)}
    parts = {
        "policy": trainer.policy_updater.state(), "collectors": collectors, "kl_weight": trainer.kl_weight.state(),
        "moments": trainer.moments.state(), "tokens": trainer.tokens, "step": trainer.step,
    }  # fmt: skip
    if trainer.critic is not None:
        networks[CRITIC] = full_trained(trainer.critic)
    if trainer.critic_updater is not None:
        parts["critic"] = trainer.critic_updater.state()

    def write(folder):
        for name, weights in networks.items():
            save_file({key: weight.detach().contiguous() for key, weight in weights.items()}, folder / name)
        write_state(folder, **parts)

    trainer.stage.save(trainer.step, write)


def load(trainer, folder) -> None:
    """Set the trainer to a checkpoint. UserError where it was made by another number of processes."""
    load_trained(trainer.policy, load_file(folder / WEIGHTS))
    if trainer.critic is not None:
        load_trained(trainer.critic, load_file(folder / CRITIC))
    parts = read_state(folder)
    world, found = trainer.accelerator.num_processes, len(parts["collectors"])
    if found != world:
        raise UserError(f"{folder} was made by {found} processes, this run has {world}: launch it with {found}")
    trainer.policy_updater.load_state(parts["policy"])
    if trainer.critic_updater is not None:
        trainer.critic_updater.load_state(parts["critic"])
    trainer.collector.load_state(parts["collectors"][trainer.accelerator.process_index])
    trainer.kl_weight.load_state(parts["kl_weight"])
    trainer.moments.load_state(parts["moments"])
    trainer.tokens, trainer.step = parts["tokens"], parts["step"]
