"""What every engine shares: its settings, how to sample, seeds, and calls that end within a time-out.

In: keys of the YAML file. Out: `EngineConfig`, `Sampling`, and the protocol `Engine` that the loop is written against.
"""

import atexit
import hashlib
import os
import queue
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch

from posttrain.args import arg, at_least
from posttrain.errors import UserError
from posttrain.rl.types import Completion

WORDS = {
    "use_vllm": ("auto", "true", "false", "server"),
    "vllm_mode": ("colocate", "server"),
    "vllm_enable_sleep_mode": ("auto", "true", "false"),
    "vllm_lora": ("merge", "adapter"),
    "vllm_sync": ("auto", "group", "memory"),
}


class EngineError(UserError):
    """An engine died, hangs or refuses; the message names it and the reason."""


@dataclass
class EngineConfig:
    """Engine: what samples"""

    use_vllm: str = arg(
        "auto",
        help="auto: vLLM where it is installed, else transformers' generate; true; false; server: vllm_mode server",
    )
    vllm_mode: str = arg("colocate", help="colocate: vLLM inside the trainer; server: one that `posttrain serve` runs")
    vllm_server_base_url: str | None = arg(None, help="for example http://127.0.0.1:8000; wins over host and port")
    vllm_server_host: str = arg("127.0.0.1", help="host of the server")
    vllm_server_port: int = arg(8000, help="port of the server")
    vllm_server_timeout: float = arg(240.0, help="seconds to wait for the server to be up")
    vllm_sync: str = arg(
        "auto",
        help="how weights reach the server. group: a process group, NCCL on GPUs, gloo on CPU; memory: shared memory "
        "of one machine; auto: memory where both are on one machine without a GPU for each, else group",
    )
    vllm_group_port: int = arg(0, help="port of this machine where the server's workers find the group; 0: a free one")
    vllm_timeout: float = arg(600.0, help="seconds that one call of an engine may take; then the run ends")
    vllm_kv_cache_gb: float = arg(1.0, help="memory for vLLM's key-value cache, in GiB")
    vllm_gpu_memory_utilization: float | None = arg(
        None, help="share of the GPU for vLLM's weights and cache, in place of vllm_kv_cache_gb; CUDA only"
    )
    vllm_max_num_seqs: int = arg(512, help="completions that vLLM samples side by side")
    vllm_enforce_eager: bool = arg(True, help="no compilation: vLLM is up in seconds")
    vllm_enable_sleep_mode: str = arg(
        "auto", help="vLLM gives its memory back between generations; auto: where the device can (CUDA)"
    )
    vllm_lora: str = arg("merge", help="with use_peft, vLLM gets merged weights, or the adapter beside the base model")

    def __post_init__(self):
        for key, words in WORDS.items():
            value = str(getattr(self, key)).lower()
            setattr(self, key, value)
            if value not in words:
                raise UserError(f"{key}: found {value!r}, expected {', '.join(words[:-1])} or {words[-1]}")
        at_least(self, vllm_max_num_seqs=1)
        if not 0 <= self.vllm_group_port <= 65535:
            raise UserError(f"vllm_group_port: found {self.vllm_group_port}, expected 0 to 65535")
        for key in ("vllm_server_timeout", "vllm_timeout", "vllm_kv_cache_gb"):
            if getattr(self, key) <= 0:
                raise UserError(f"{key}: found {getattr(self, key)}, expected more than 0")
        share = self.vllm_gpu_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise UserError(f"vllm_gpu_memory_utilization: found {share}, expected more than 0 and at most 1")
        if self.use_vllm == "server":
            self.vllm_mode = "server"
        if self.vllm_mode == "server" and self.use_vllm == "false":
            raise UserError("vllm_mode: found server with use_vllm: false; leave one of them out")
        if self.vllm_mode == "server" and self.vllm_lora == "adapter":
            raise UserError("vllm_lora: adapter works with vllm_mode: colocate; a server gets merged weights: merge")
        url = self.vllm_server_base_url
        if url is not None and not url.startswith("http://"):
            raise UserError(f"vllm_server_base_url: found {url!r}, expected http://HOST:PORT")

    @property
    def server_url(self) -> str:
        return (self.vllm_server_base_url or f"http://{self.vllm_server_host}:{self.vllm_server_port}").rstrip("/")


@dataclass(frozen=True)
class Sampling:
    """How to sample: `n` completions a prompt, at most `max_tokens` each, ending at any of `stop_ids`.

    Of the `top_k` likeliest tokens (0: all), the smallest set that holds `top_p` of their mass can be drawn.
    """

    n: int
    max_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


class Engine(Protocol):
    """`name` for logs; `generate` returns n completions for each prompt, side by side.

    concurrent: `generate` may run in one thread while another one trains the policy: it reads neither the policy nor
    torch's global random state.
    """

    name: str
    concurrent: bool

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]: ...

    def sync_weights(self, model: torch.nn.Module) -> None: ...


def sample_seed(*parts: int) -> int:
    """A 31-bit seed from (seed, step, prompt, sample): hashed, since seeds counted up collide with neighbours."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


def request_seeds(prompts: int, n: int, seed: int) -> list[list[int]]:
    """One seed for each sample, (prompts, n): the same for the engine in this process and for the server."""
    return [[sample_seed(seed, prompt, sample) for sample in range(n)] for prompt in range(prompts)]


class Watchdog:
    """Runs calls one at a time in a thread of its own, and gives one up after `timeout` seconds.

    A thread cannot be killed: what hangs goes on hanging, later calls are refused, and the process ends with
    `os._exit` once it is through with everything else, for example a checkpoint. A call that never lets go of Python's
    global lock cannot be watched this way.
    """

    def __init__(self, name: str, timeout: float):
        self.name, self.timeout, self.hung = name, timeout, None
        self.calls: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._work, name=f"{name} calls", daemon=True).start()

    def call(self, what: str, function: Callable[[], Any]) -> Any:
        """`function()`; EngineError after `timeout` seconds, or where it raises anything but a UserError."""
        if self.hung:
            raise EngineError(self.hung)
        done, box = threading.Event(), {}
        self.calls.put((function, box, done))
        if not done.wait(self.timeout):
            self.hung = (
                f"{self.name}: {what} took longer than vllm_timeout, {self.timeout:g} s: the engine hangs or is too "
                "slow for this many tokens; raise vllm_timeout, or sample fewer or shorter completions a step"
            )
            atexit.register(leave_at_once)
            raise EngineError(self.hung)
        error = box.get("error")
        if error is None:
            return box["value"]
        if isinstance(error, UserError):
            raise error
        text = (str(error).splitlines() or [""])[0][:300]
        raise EngineError(f"{self.name}: {what} failed: {type(error).__name__}: {text}") from error

    def _work(self) -> NoReturn:
        while True:
            function, box, done = self.calls.get()
            try:
                box["value"] = function()
            except BaseException as error:  # it is raised again where the call was made
                box["error"] = error
            done.set()
            del function, box, done


def leave_at_once() -> NoReturn:
    """End the process with 2, a UserError's code, without waiting for a thread that hangs."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)
