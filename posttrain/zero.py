"""DeepSpeed ZeRO-3 in the place of FSDP2, where `accelerate launch` was asked for it: the same steps and checkpoints.

In: a plain module and the groups of its optimizer. Out: DeepSpeed's engine around it, which keeps a slice of each
parameter, gradient and moment on each process; whole tensors one at a time, whole models for a while or for good.

    engine = split(module, groups, optimizer, max_norm)
    with gathered(engine): ...  # whole on every process, and DeepSpeed keeps out
    optimizer_state(engine, groups)  # torch's own format: one process, DDP, FSDP2 and ZeRO-3 load each other's
    unsplit(engine)

posttrain/sharding.py calls this; use that. Rajbhandari et al. 2019, arXiv 1910.02054. `pip install 'posttrain[zero]'`.
"""

import logging
import os
import warnings
from collections import OrderedDict
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from posttrain.errors import UserError

LAUNCHED, OURS = "ACCELERATE_USE_DEEPSPEED", "POSTTRAIN_ZERO3"
# Settings of Accelerate's DeepSpeed that would change what happens, and the only value that this code has.
ONLY = {
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": ("deepspeed_config_file", "none", "this package writes DeepSpeed's settings"),
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("zero_stage", "3", "for whole models take recipes/accelerate/ddp.yaml"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": ("offload_param_device", "none", "parameters stay on their device"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": (
        "offload_optimizer_device", "none", "moments stay with their parameters"
    ),
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": ("zero3_init_flag", "false", "models are loaded whole, then split"),
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": (
        "zero3_save_16bit_model", "false", "checkpoints are written in fp32"
    ),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "gradient_accumulation_steps", "1", "a recipe's tokens or rows in a micro-batch decide"
    ),
    "ACCELERATE_GRADIENT_CLIPPING": ("gradient_clipping", "none", "the recipe's max_grad_norm decides"),
}  # fmt: skip
MOMENTS = ("exp_avg", "exp_avg_sq")
# What DeepSpeed leaves on modules when its hooks are gone, beside the names that begin with ds_.
LEFT_BEHIND = {
    "_original_parameters", "_external_params", "all_parameters", "applied_pre_backward_ref_cnt", "pre_bwd_fn",
    "post_bwd_fn",
}  # fmt: skip


def wanted() -> bool:
    """Whether `accelerate launch` was asked for DeepSpeed. UserError for settings other than those in ONLY."""
    from accelerate.utils import parse_flag_from_env

    if not parse_flag_from_env(LAUNCHED) and OURS not in os.environ:
        return False
    for variable, (key, value, why) in ONLY.items():
        found = os.environ.get(variable, value).lower()
        if found != value:
            raise UserError(f"deepspeed_config: {key}: found {found}, expected {value}: {why}")
    return True


def keep_from_accelerate() -> None:
    """Accelerate starts the processes and sums over them as ever. Told of DeepSpeed, it would want one engine of its
    own for the whole run, and transformers would split each model that it loads."""
    if wanted() and OURS not in os.environ:
        os.environ[OURS] = os.environ.pop(LAUNCHED)


def _deepspeed():
    from importlib.util import find_spec

    if find_spec("deepspeed") is None:
        raise UserError("DeepSpeed was asked for and is not installed: pip install 'posttrain[zero]', or fsdp2.yaml")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    # On CPUs it would compile a sum over shared memory of its own; gloo does without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)  # it sets its own while it is imported
    # The module has its autocast inside, which DeepSpeed does not know of.
    deepspeed.utils.logger.addFilter(lambda record: "autocast is enabled outside" not in record.getMessage())
    return deepspeed


def split(module: nn.Module, groups: list[dict], optimizer: torch.optim.Optimizer, max_norm: float):
    """DeepSpeed's engine around `module`, whose parameters become slices in place: call the engine, never the module.

    `optimizer` has `groups`; its moments become slices, too. Parameters, gradients and what travels are fp32. The
    engine's `step` clips to `max_norm`. All processes must make the same number of forwards and backwards.
    """
    deepspeed = _deepspeed()
    deepspeed.init_distributed(torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)
    trained = sum(parameter.numel() for group in groups for parameter in group["params"])
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # `set_gradient_accumulation_boundary` says where a step ends
        "gradient_clipping": max_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,  # small parameters are split like the others
            "reduce_bucket_size": min(500_000_000, trained),  # a buffer of that size is kept
        },
    }
    # DeepSpeed 0.19.8 calls torch 2.13's collectives by their old names.
    warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)
    return deepspeed.initialize(model=module, optimizer=optimizer, config=settings)[0]


def is_split(parameter: Tensor) -> bool:
    return "ds_tensor" in vars(parameter)


def full(parameter: nn.Parameter) -> Tensor:
    """The whole of a split parameter, in fp32; every process takes part."""
    return _join(parameter, parameter.ds_tensor.detach())


def _join(parameter, mine: Tensor) -> Tensor:
    whole = mine.new_empty(torch.distributed.get_world_size() * mine.numel())
    torch.distributed.all_gather_single(whole, mine.contiguous())
    return whole[: parameter.ds_numel].view(parameter.ds_shape)


def _slice(parameter, value: Tensor) -> Tensor:
    """This process's slice of a whole `value`, with zeros behind its end."""
    size = parameter.ds_tensor.numel()
    start = torch.distributed.get_rank() * size
    piece, mine = value.flatten()[start : start + size], torch.zeros_like(parameter.ds_tensor)
    mine[: len(piece)] = piece
    return mine


@torch.no_grad()
def fill(parameter: nn.Parameter, value: Tensor) -> None:
    """Copy a whole `value`, which every process has, into a split parameter. Nothing is sent."""
    from deepspeed.utils import safe_set_local_fp32_param

    if value.shape != parameter.ds_shape:
        raise ValueError(f"a tensor of {tuple(value.shape)} for a parameter of {tuple(parameter.ds_shape)}")
    mine = _slice(parameter, value)
    parameter.ds_tensor.copy_(mine)
    if parameter.requires_grad:
        safe_set_local_fp32_param(parameter, mine)  # the optimizer's own copy


def gradient_norm(engine) -> Tensor:
    """The norm of the gradient of all parts on all processes, after the last backward of a step."""
    from deepspeed.utils import safe_get_local_grad

    trained = [parameter for parameter in engine.module.parameters() if parameter.requires_grad]
    total = torch.stack([safe_get_local_grad(parameter).double().square().sum() for parameter in trained]).sum()
    torch.distributed.all_reduce(total)
    return total.sqrt().float()


def optimizer_state(engine, groups: list[list[nn.Parameter]]) -> dict:
    """AdamW's state as `state_dict` of torch has it, whole, on the CPU of the first process; on the others nothing.

    groups: the parameters of each group, in order. Every process takes part.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    inner, main = engine.optimizer.optimizer, torch.distributed.get_rank() == 0
    parameters, state = [parameter for group in groups for parameter in group], {}
    if inner.state:  # empty before the first step; all parameters make the same steps
        steps = next(iter(inner.state.values()))["step"].clone().cpu()
        for index, parameter in enumerate(parameters):
            moments = {}
            for key in MOMENTS:
                whole = safe_get_full_optimizer_state(parameter, key)
                moments[key] = whole.cpu() if main else None
            state[index] = {"step": steps.clone(), **moments}
    numbers = iter(range(len(parameters)))
    kept = [
        {**{key: value for key, value in own.items() if key != "params"}, "params": [next(numbers) for _ in group]}
        for own, group in zip(inner.param_groups, groups, strict=True)
    ]
    return {"state": state, "param_groups": kept} if main else {}


def load_optimizer_state(engine, groups: list[list[nn.Parameter]], saved: dict) -> None:
    """Take over what `state_dict` of torch gave, whole, which every process has. UserError where its parameters have
    made different numbers of steps, for DeepSpeed counts them together."""
    from deepspeed.utils import safe_set_local_optimizer_state

    inner, parameters = engine.optimizer.optimizer, [parameter for group in groups for parameter in group]
    for own, theirs in zip(inner.param_groups, saved["param_groups"], strict=True):
        own.update({key: value for key, value in theirs.items() if key != "params"})
    if not saved["state"]:
        return
    steps = {float(values["step"]) for values in saved["state"].values()}
    if len(steps) > 1 or len(saved["state"]) != len(parameters):
        raise UserError(
            f"the checkpoint's parameters made {sorted(steps)} steps, {len(parameters) - len(saved['state'])} none; "
            "DeepSpeed wants the same of all: go on with recipes/accelerate/fsdp2.yaml or ddp.yaml"
        )
    for flat in engine.optimizer.fp32_partitioned_groups_flat:
        inner.state[flat] = {"step": torch.tensor(min(steps)), **{key: torch.zeros_like(flat) for key in MOMENTS}}
    for index, parameter in enumerate(parameters):
        for key in MOMENTS:
            safe_set_local_optimizer_state(parameter, _slice(parameter, saved["state"][index][key]), key)


@contextmanager
def whole(module: nn.Module):
    """For a while the parameters of `module`, and no others, are whole on every process, for reading."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        yield


@contextmanager
def gathered(engine):
    """For a while the engine's module is whole on every process, and forwards without gradient need no other one."""
    hooks = [(part, part._forward_pre_hooks, part._forward_hooks) for part in engine.module.modules()]
    with whole(engine.module):
        for part, *_ in hooks:  # they would split each layer again behind its forward, and compare the processes
            part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
        try:
            yield
        finally:
            for part, before, after in hooks:
                part._forward_pre_hooks, part._forward_hooks = before, after


@torch.no_grad()
def unsplit(engine) -> nn.Module:
    """Make the engine's module and the models inside plain and whole again on every process, for good, in fp32."""
    module, plain = engine.module, {}
    old = list({id(parameter): parameter for parameter in module.parameters()}.values())
    for parameter in old:
        plain[id(parameter)] = nn.Parameter(full(parameter), requires_grad=parameter.requires_grad)
    engine.destroy()
    for part in module.modules():
        own = dict(part._parameters)  # DeepSpeed put a class of its own there
        vars(part)["_parameters"] = {name: None if p is None else plain[id(p)] for name, p in own.items()}
        for name in [name for name in vars(part) if name.startswith("ds_") or name in LEFT_BEHIND]:
            del vars(part)[name]
    return module
