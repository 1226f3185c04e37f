"""Models whose weights lie in parts over the processes (FSDP2, or DeepSpeed ZeRO-3).

In: a model, where `accelerate launch` was asked to spread it (posttrain/processes.py). Out: the model sharded, in
place, its weights gathered one at a time or all at once, and states for checkpoints that any number of processes can
load, sharded or not.

    module = shard(PolicyForward(policy), accelerator)  # by torch's own `fully_shard`, on GPUs and CPUs alike
    for name, weight in full_weights(policy): ...  # every process takes part, in the same order
    with gathered(module): ...  # whole on every process: forwards need no other process
    unshard(module)  # training is over

Accelerate's own FSDP2 takes one model, and on CPUs none: it trains with DDP there and says nothing. It gives us the
launcher, the processes and the precision; `recipes/accelerate/fsdp2.yaml` is its file. Everything here but `shard`
takes what DeepSpeed has split as well (posttrain/zero.py, `recipes/accelerate/deepspeed_zero3.yaml`).
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from posttrain import zero
from posttrain.errors import UserError


def blocks(module: nn.Module) -> list[nn.Module]:
    """What is gathered at a time, innermost first: the decoder layers, by the names that transformers gives them."""
    from transformers import PreTrainedModel

    models = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    names = {name for model in models for name in model._no_split_modules or ()}
    if chosen := os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP"):
        names = set(chosen.split(","))
    parts = reversed(list(module.modules()))
    # `fully_shard` gives a module a class of its own, below the one that has the name.
    return [part for part in parts if any(kind.__name__ in names for kind in type(part).__mro__)]


def shard(module: nn.Module, accelerator) -> nn.Module:
    """Spread the parameters of `module` over all processes, in place: each keeps a slice of each, on `module` and on
    all models inside it. Starts from the weights of the first process, as DDP does.

    Each decoder layer is gathered for its own forward and backward, the rest (embeddings, norm, head) for those of
    `module`: call `module`, not what is inside. With bf16 the gathered weights and the arithmetic are bf16, shards,
    gradients and optimizer fp32. All processes must make the same number of forwards and backwards.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    _same_start(module, accelerator)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    options = {"mesh": mesh, "reshard_after_forward": True}
    if accelerator.mixed_precision == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in blocks(module):
        fully_shard(block, **options)
    fully_shard(module, **options)
    # It warns of changing an output in place, which no loss here does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # The first module to run becomes the root. It must be this one, whichever the caller runs first.
    fully_shard.state(module)._lazy_init()
    return module


def shard_by_deepspeed(module: nn.Module, groups: list[dict], optimizer, accelerator, max_norm: float):
    """The same by DeepSpeed, whose engine comes back: call it. Gathered weights are fp32, with bf16, too."""
    _same_start(module, accelerator)
    return zero.split(module, groups, optimizer, max_norm)


def _same_start(module: nn.Module, accelerator) -> None:
    if any(not parameter.dtype.is_floating_point for parameter in module.parameters()):
        raise UserError("load_in_4bit: 4-bit weights cannot be in shards; take recipes/accelerate/ddp.yaml")
    for tensor in (*module.parameters(), *module.buffers()):
        torch.distributed.broadcast(tensor.data, 0)
    if accelerator.mixed_precision == "bf16":
        module.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(module.forward)


def is_sharded(module: nn.Module) -> bool:
    return any(_in_parts(parameter) for parameter in module.parameters())


def _in_parts(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor) or zero.is_split(tensor)


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, without gradient (every process takes part); any other one as it is."""
    from torch.distributed.tensor import DTensor

    if zero.is_split(tensor):
        return zero.full(tensor)
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Copy a whole `value`, which every process has, into a tensor that may be sharded. Nothing is sent."""
    if zero.is_split(tensor):
        zero.fill(tensor, value)
    else:
        tensor.copy_(_like(tensor, value))


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(tensor.device)
    if not isinstance(tensor, DTensor):
        return value
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)


def full_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(plain name, whole weight with its adapter added) of every parameter, for an engine; what is tied comes once.

    At most one decoder layer, or all that is outside of them, is whole at a time. Every process must iterate to the
    end where the model is sharded. `model` is the transformers model itself.
    """
    from posttrain.lora import merged_weights

    if not is_sharded(model):
        yield from merged_weights(model)
        return
    inside = set(blocks(model))
    names = [name for name, part in model.named_modules() if name and part in inside]
    layers = {name: model.get_submodule(name) for name in names if not any(name.startswith(f"{n}.") for n in names)}
    for name, layer in layers.items():
        with _whole(layer):
            weights = list(merged_weights(layer))
        yield from ((f"{name}.{leaf}", weight) for leaf, weight in weights)
    for name in layers:
        model.set_submodule(name, nn.Identity())
    try:
        with _whole(model):
            weights = list(merged_weights(model))
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
    yield from weights


@contextmanager
def _whole(module: nn.Module):
    """For a while every sharded parameter of `module` stands as a whole in its place."""
    from torch.distributed.tensor import DTensor

    if any(map(zero.is_split, module.parameters())):
        with zero.whole(module):
            yield
        return
    places = [(part, leaf, p) for part in module.modules() for leaf, p in part.named_parameters(recurse=False)]
    places = [place for place in places if isinstance(place[2], DTensor)]
    whole = {}
    for part, leaf, parameter in places:
        if id(parameter) not in whole:  # tied weights stay tied
            whole[id(parameter)] = nn.Parameter(full(parameter), requires_grad=parameter.requires_grad)
        setattr(part, leaf, whole[id(parameter)])
    try:
        yield
    finally:
        for part, leaf, parameter in places:
            setattr(part, leaf, parameter)


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """`model.state_dict()`; of a sharded model, which needs every process, whole tensors on the CPU of the first
    process (ready for `save_pretrained(folder, state_dict=...)`), and on the others nothing."""
    if not is_sharded(model):
        return model.state_dict()
    main, whole, state = torch.distributed.get_rank() == 0, {}, {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in whole:  # tied weights stay tied
            gathered = full(tensor)
            whole[id(tensor)] = gathered.cpu() if main else None
        state[name] = whole[id(tensor)]
    return state if main else {}


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that training changes, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def full_trained(model: nn.Module) -> dict[str, Tensor]:
    """`trained` as `full_state` gives them; `load_trained` takes them back."""
    if not is_sharded(model):
        return {name: full(parameter) for name, parameter in trained(model).items()}
    main = torch.distributed.get_rank() == 0
    gathered = ((name, full(parameter)) for name, parameter in trained(model).items())  # by every process
    return {name: whole.cpu() for name, whole in gathered if main}


def load_trained(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Fill the parameters that training changes; every process has all of `weights`, sharded or not."""
    for name, parameter in trained(model).items():
        fill(parameter, weights[name])


def load_full_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load what `full_state` gave or `save_pretrained` wrote; every process has all of `state`.

    KeyError naming a tensor that is missing; of tied ones, one is enough. ValueError naming those that have no place.
    """
    filled, own = set(), model.state_dict(keep_vars=True)
    for name, tensor in own.items():
        if name in state:
            fill(tensor, state[name])
            filled.add(id(tensor))
    if missing := [name for name, tensor in own.items() if id(tensor) not in filled]:
        raise KeyError(f"no {', '.join(missing[:4])} in the state")
    if left := sorted(set(state) - set(own)):
        raise ValueError(f"the model has no {', '.join(left[:4])}")


def optimizer_state(optimizer) -> dict:
    """`optimizer.state_dict()` with whole tensors; where sharded, every process takes part and the first has it."""
    found = optimizer.state_dict()
    if not _sharded_optimizer(optimizer):
        return found
    main = torch.distributed.get_rank() == 0

    def whole(value):
        gathered = full(value) if isinstance(value, Tensor) else value
        return gathered.cpu() if main and isinstance(gathered, Tensor) else gathered if main else None

    state = {index: {k: whole(v) for k, v in values.items()} for index, values in found["state"].items()}
    return {**found, "state": state} if main else {}


def load_optimizer_state(optimizer, state: dict) -> None:
    """Load what `optimizer_state` gave, with as many processes as there are now; every process has all of `state`."""
    if _sharded_optimizer(optimizer):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

        def part(value, parameter):
            return _like(parameter, value) if getattr(value, "shape", None) == parameter.shape else value

        entries = {i: {k: part(v, parameters[i]) for k, v in values.items()} for i, values in state["state"].items()}
        state = {**state, "state": entries}
    optimizer.load_state_dict(state)


def _sharded_optimizer(optimizer) -> bool:
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])


@contextmanager
def gathered(module: nn.Module):
    """For a while `module` and the models inside are whole on every process, in the precision they compute in.

    Inside, each process makes as many forwards without gradient as it likes (generation, evaluation), of `module` or
    of what is inside it; change no weight there. Costs the memory of a whole model. Nothing where it is not sharded.
    """
    from torch.distributed.fsdp import FSDPModule

    if any(map(zero.is_split, module.parameters())):
        with zero.gathered(module):
            yield module
        return
    units = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    _mark(module, units, False)
    try:
        yield module
    finally:
        _mark(module, units, True)
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()
            _forget_forwards(unit)


def _forget_forwards(unit) -> None:
    """A backward fetches layers ahead in the order of all forwards since the last one. Processes that made different
    numbers of forwards would fetch different layers and wait for each other for good (torch 2.13)."""
    from torch.distributed.fsdp import fully_shard

    state = fully_shard.state(unit)
    state._comm_ctx.post_forward_order.clear()
    for group in state._fsdp_param_groups:
        group._post_forward_indices.clear()


def _mark(module: nn.Module, units: list, sharded: bool) -> None:
    """transformers' `generate` reads this mark and then goes on until the last process is done."""
    for part in module.modules() if units else ():
        part._is_fsdp_managed_module = sharded


@torch.no_grad()
def unshard(module: nn.Module) -> nn.Module:
    """Make `module` and the models inside it plain and whole again on every process, for good, in fp32.

    Its optimizer is of no use any more. Every process takes part. Nothing where it is not sharded.
    """
    if any(map(zero.is_split, module.parameters())):
        return zero.unsplit(module)
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import DTensor

    whole, sharded = {}, []
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                if id(parameter) not in whole:
                    sharded.append(parameter)  # while it lives, no other has its id
                    whole[id(parameter)] = nn.Parameter(full(parameter), requires_grad=parameter.requires_grad)
                setattr(part, name, whole[id(parameter)])
        if isinstance(part, FSDPModule):
            state = fully_shard.state(part)
            state._pre_forward_hook_handle.remove()
            state._post_forward_hook_handle.remove()
            part.__class__ = type(part).__mro__[2]  # what it was, beneath FSDPModule
            for key in [key for key in vars(part) if key.startswith("__composable_api")]:
                del vars(part)[key]
    _mark(module, sharded, False)
    return module
