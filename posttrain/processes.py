"""Who trains with whom: the processes of a run, and how `accelerate launch` was asked to spread a model over them.

In: the environment that the launcher leaves. Out: the processes, in words too ("2 processes on cpu (gloo), FSDP2:
parameters in 2 shards"), or a refusal where they are not what was asked for.
"""

import os

import torch

from posttrain import zero
from posttrain.errors import UserError

# Settings of Accelerate's FSDP that would change what happens, and the only value that this code has.
ONLY = {
    "FSDP_VERSION": ("fsdp_version", "2", "FSDP1 flattens parameters and cannot give them out one by one"),
    "FSDP_RESHARD_AFTER_FORWARD": ("fsdp_reshard_after_forward", "true", "a whole layer would go stale between steps"),
    "FSDP_CPU_RAM_EFFICIENT_LOADING": (
        "fsdp_cpu_ram_efficient_loading", "false", "all processes but one would start from empty weights"
    ),
    "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", "false", "parameters stay on their device"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("fsdp_activation_checkpointing", "false", "activations are kept"),
}  # fmt: skip


def asked() -> str:
    """How `accelerate launch` was asked to spread a model: "fsdp2", "zero3" or "ddp" (a whole one on each process).

    UserError for what this package does not do: settings of FSDP or DeepSpeed other than those in the two ONLY.
    """
    from accelerate.utils import parse_flag_from_env

    if zero.wanted():
        return "zero3"
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return "ddp"
    for variable, (key, value, why) in ONLY.items():
        found = os.environ.get(variable, value).lower()
        if found != value:
            raise UserError(f"fsdp_config: {key}: found {found}, expected {value}: {why}")
    return "fsdp2"


NAMES = {"fsdp2": "FSDP2", "zero3": "DeepSpeed ZeRO-3"}


def refuse_shards(name: str, why: str) -> None:
    """UserError where `accelerate launch` was asked for shards and stage `name` has no way to make them."""
    if (how := asked()) != "ddp":
        raise UserError(f"{name}: no {NAMES[how]} here ({why}): launch it with recipes/accelerate/ddp.yaml")


def join():
    """Accelerate's view of the processes of this run.

    UserError where they are not as many as were asked for (each would train alone, into the same folder), or where
    one process is asked to share its parameters with others.
    """
    import accelerate
    from accelerate.utils import parse_flag_from_env

    how, launched = asked(), int(os.environ.get("WORLD_SIZE", "1"))
    zero.keep_from_accelerate()
    if launched > 1 and not torch.cuda.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # else each looks for a GPU, and trains alone without one
    # `Accelerator()` reads this flag by itself, `PartialState()` does not, and whoever comes first decides.
    process = accelerate.PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    if process.num_processes != launched:
        raise UserError(
            f"{launched} processes were launched, but Accelerate runs {process.num_processes}: several processes "
            "without a GPU each need ACCELERATE_USE_CPU=true in front of `accelerate launch --multi_gpu`"
        )
    # The launcher for one process sets this address where it was asked for more, and then starts one all the same.
    by_accelerate = "ACCELERATE_DYNAMO_BACKEND" in os.environ and "WORLD_SIZE" not in os.environ
    if by_accelerate and process.num_processes == 1 and "MASTER_ADDR" in os.environ:
        raise UserError(
            "several processes were asked for, but `accelerate launch` started one (it does so with --cpu, or with "
            "distributed_type NO): take recipes/accelerate/two_cpu_processes.yaml or ddp.yaml, or --num_processes 1"
        )
    if how != "ddp" and process.num_processes == 1:
        raise UserError(
            f"{NAMES[how]} was asked for, but there is one process: --num_processes 2, or one_process.yaml"
        )
    return process


def describe(process) -> str:
    """The real processes and sharding in words: "2 processes on cpu (gloo), FSDP2: parameters in 2 shards"."""
    count = process.num_processes
    if count == 1:
        return f"one process on {process.device}"
    machines = count // int(os.environ.get("LOCAL_WORLD_SIZE", count))
    where = f"{process.device.type} ({torch.distributed.get_backend()})"
    spread = f" on {machines} machines" if machines > 1 else ""
    how = asked()
    what = "DDP: a whole model each" if how == "ddp" else f"{NAMES[how]}: parameters in {count} shards"
    return f"{count} processes{spread} on {where}, {what}"
