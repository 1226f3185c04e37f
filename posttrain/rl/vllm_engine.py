"""vLLM inside the trainer's process: one engine, on CPU or CUDA.

In: a model, and after each update its new weights. Out: completions with the log-probabilities they were sampled with.
Weights travel through vLLM's `reload_weights`, which repacks layers as loading does; a LoRA adapter is added to them
on the way, or travels alone (`vllm_lora: adapter`).
"""

import gc
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from posttrain.errors import UserError
from posttrain.lora import ADAPTER, has_adapter, merged_weights, save_model
from posttrain.rl.engine import EngineConfig, Sampling, Watchdog, request_seeds
from posttrain.rl.types import Completion
from posttrain.rl.vllm_worker import repack_tied_head, use_seeds_alone

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's `max_lora_rank` can be
PREFIX_CACHE_FROM = 256  # tokens; below two blocks of 128 there is little to share, and looking it up costs time


class VLLMEngine:
    """One live engine a process. `weights_of(model)` gives (name, whole tensor) of every weight, adapters added."""

    concurrent = True

    def __init__(
        self, config: EngineConfig, model, tokenizer, max_model_len: int, seed: int, scratch: Path,
        weights_of: Callable[[torch.nn.Module], Iterator] = merged_weights,
    ):  # fmt: skip
        """`scratch` takes a temporary checkpoint, which vLLM loads its first weights from."""
        set_environment()
        import vllm

        self.name, self.weights_of = f"vllm {vllm.__version__}", weights_of
        self.watchdog = Watchdog(self.name, config.vllm_timeout)
        self.sleeps = sleep_mode(config)
        self.asleep = False
        self.lora, self.syncs = None, 0
        self.by_adapter = config.vllm_lora == "adapter" and has_adapter(model)
        threads = torch.get_num_threads()
        folder = scratch / ".tmp-engine"
        (save_base if self.by_adapter else save_model)(model, folder)
        tokenizer.save_pretrained(folder)
        try:
            with torch.random.fork_rng():
                self.llm = vllm.LLM(
                    str(folder),
                    dtype=str(model.dtype).removeprefix("torch."),
                    max_model_len=max_model_len,
                    seed=seed,
                    enforce_eager=config.vllm_enforce_eager,
                    max_num_seqs=config.vllm_max_num_seqs,
                    enable_prefix_caching=max_model_len >= PREFIX_CACHE_FROM,
                    enable_sleep_mode=self.sleeps,
                    logprobs_mode="processed_logprobs",
                    disable_log_stats=True,
                    use_tqdm_on_load=False,
                    enable_chunked_prefill=False,  # a seeded request cut in two dies on CPU (vLLM 0.31)
                    **memory(config),
                    **(lora_room(model) if self.by_adapter else {}),
                )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        torch.set_num_threads(threads)
        self.llm.collective_rpc(use_seeds_alone)
        if self.by_adapter:
            self.sync_weights(model)

    def sync_weights(self, model) -> None:
        """Take `model`'s weights; forget cached prefixes, which belong to the old ones."""
        self.watchdog.call("sync_weights", lambda: self._load_adapter(model) if self.by_adapter else self._load(model))

    def _load(self, model) -> None:
        self._wake()
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self.weights_of(model)})
        self.llm.apply_model(repack_tied_head)
        self.llm.reset_prefix_cache()

    def _load_adapter(self, model) -> None:
        """vLLM keeps what it read of an adapter, so that every sync needs a new id; the old one is dropped."""
        from vllm.lora.request import LoRARequest

        self._wake()
        old, self.syncs = self.lora, self.syncs + 1
        with tempfile.TemporaryDirectory(prefix="posttrain-adapter-") as folder:
            save_adapter(model, Path(folder))
            self.lora = LoRARequest(f"step {self.syncs}", self.syncs, folder)
            self.llm.llm_engine.add_lora(self.lora)
        if old is not None:
            self.llm.llm_engine.remove_lora(old.lora_int_id)

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        return self.watchdog.call("generate", lambda: self._generate(prompts, sampling, seed))

    def _generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        from vllm import SamplingParams

        self._wake()
        seeds = request_seeds(len(prompts), sampling.n, seed)
        requests = [{"prompt_token_ids": prompt} for prompt in prompts for _ in range(sampling.n)]
        params = [SamplingParams(**sampling_fields(sampling), seed=one) for group in seeds for one in group]
        with no_garbage_collection():
            outputs = self.llm.generate(requests, params, use_tqdm=False, lora_request=self.lora)
        completions = [from_vllm(output.outputs[0]) for output in outputs]
        if self.sleeps:
            self.llm.sleep(level=1)
            self.asleep = True
        return completions

    def _wake(self) -> None:
        if self.asleep:
            self.llm.wake_up()
            self.asleep = False


def sampling_fields(sampling: Sampling) -> dict:
    """What vLLM's SamplingParams get, in this process and at the server, but for the seed."""
    return {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "stop_token_ids": list(sampling.stop_ids),
        "ignore_eos": True,  # stop_ids alone decide, as in HFEngine
        "logprobs": 0,
        "flat_logprobs": True,
        "detokenize": False,
    }


def from_vllm(output) -> Completion:
    """A completion of vLLM's; with `logprobs` 0 its flat list holds one number a token, the sampled one's."""
    ids, logps = list(output.token_ids), list(output.logprobs.logprobs)
    if len(ids) != len(logps):
        raise ValueError(f"{len(ids)} tokens came with {len(logps)} log-probabilities")
    return Completion(ids, logps, "stop" if output.finish_reason == "stop" else "length")


def set_environment() -> None:
    """What vLLM reads when it is imported: engine core in this process, threads as the trainer has them."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # vLLM's own use of names that torch has renamed is nothing a user can mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")


def memory(config: EngineConfig) -> dict:
    """What vLLM may take. UserError for a share of a GPU that is not there."""
    if config.vllm_gpu_memory_utilization is None:
        return {"kv_cache_memory_bytes": int(config.vllm_kv_cache_gb * 2**30)}
    if not torch.cuda.is_available():
        raise UserError("vllm_gpu_memory_utilization: there is no CUDA device here; give vllm_kv_cache_gb instead")
    return {"gpu_memory_utilization": config.vllm_gpu_memory_utilization}


def sleep_mode(config: EngineConfig) -> bool:
    """Whether vLLM sleeps between generations. UserError where it is asked to and cannot."""
    cuda = torch.cuda.is_available()
    if config.vllm_enable_sleep_mode == "true" and not cuda:
        raise UserError("vllm_enable_sleep_mode: true, but vLLM sleeps on CUDA devices only; leave it at auto")
    return cuda and config.vllm_enable_sleep_mode != "false"


@contextmanager
def no_garbage_collection():
    """Python's collector walks a hundred thousand live objects again and again while vLLM makes more of them: 14 % of
    the time of 384 completions of a small model."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


# --- LoRA adapters beside the base model


def lora_room(model) -> dict:
    """Arguments for vLLM: room for the adapter in use and the next one. UserError for adapters it cannot take."""
    rank = lora_settings(model)["r"]
    fitting = [size for size in LORA_RANKS if size >= rank]
    if not fitting:
        raise UserError(f"lora_r: found {rank}, vLLM takes adapters up to {LORA_RANKS[-1]}; or vllm_lora: merge")
    return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 2, "max_lora_rank": fitting[0]}


def lora_settings(model) -> dict:
    """r, lora_alpha and target_modules of a model's adapters. UserError for parts that are no LoRA matrices."""
    names = [name for name, _ in model.named_parameters()]
    other = sorted({n for n in names if ".trainable_tokens_" in n or ".modules_to_save." in n})
    if other:
        raise UserError(
            f"vllm_lora: adapter, but whole rows or layers are trained beside the LoRA matrices ({other[0]}), which "
            "vLLM cannot take in an adapter; use vllm_lora: merge"
        )
    if any(getattr(p, "quant_state", None) is not None for p in model.parameters()):
        raise UserError("vllm_lora: adapter, but the base weights are kept in 4 bits; use vllm_lora: merge")
    adapted = {name: module for name, module in model.named_modules() if ADAPTER in getattr(module, "lora_A", {})}
    first = next(iter(adapted.values()))
    return {
        "r": first.r[ADAPTER],
        "lora_alpha": first.lora_alpha[ADAPTER],
        "target_modules": sorted({name.rpartition(".")[2] for name in adapted}),
    }


def save_base(model, folder: Path) -> None:
    """A checkpoint of the weights below the adapters."""
    from safetensors.torch import save_file

    lora_settings(model)
    tied = getattr(model.config, "tie_word_embeddings", False)
    weights = {
        name.replace(".base_layer.", "."): parameter.detach().contiguous().cpu()
        for name, parameter in model.named_parameters(remove_duplicate=tied)
        if ".lora_" not in name
    }
    model.config.save_pretrained(folder)
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})


def save_adapter(model, folder: Path) -> None:
    """The adapter as peft writes it, from the model that has it inside."""
    from safetensors.torch import save_file

    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", **lora_settings(model)}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    weights = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": parameter.detach().contiguous().cpu()
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
    save_file(weights, f"{folder}/adapter_model.safetensors", metadata={"format": "pt"})
