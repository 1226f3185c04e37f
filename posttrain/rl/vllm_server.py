"""A vLLM server as an engine: `posttrain serve MODEL` runs it, any number of trainer processes sample from it.

In: prompts as token ids; weights as (name, whole tensor). Out: the very completions that vLLM inside this process
would sample. Weights travel from the trainer's main process through a process group with the server's workers
(rl/weight_group.py), or on one machine as safetensors files in shared memory, which the server reads in place.
"""

import http.client
import ipaddress
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import torch

from posttrain.lora import merged_weights
from posttrain.rl.engine import EngineConfig, EngineError, Sampling, request_seeds
from posttrain.rl.types import Completion
from posttrain.rl.vllm_engine import sampling_fields
from posttrain.rl.vllm_worker import WEIGHT_FOLDER
from posttrain.rl.weight_group import backend_for, buckets, describe_device, form, in_background, sync_way

SHARED_MEMORY = Path("/dev/shm")
BUCKET = 512 * 2**20  # bytes of one file
LAST_WORD = 5.0  # seconds for the server's reason to come after a group broke
CONNECT_TRIES, CONNECT_PAUSE = 3, 0.5  # before anything is sent, trying again is safe; seconds between


class VLLMServerEngine:
    """Every process of the trainer has one and samples for itself; the main one sends the weights.

    Nothing is sent twice: after a failure the server's weights may not be the trainer's any more.
    """

    concurrent = True

    def __init__(
        self, config: EngineConfig, model, max_model_len: int,
        weights_of: Callable[[torch.nn.Module], Iterator] = merged_weights, note: Callable[[str], None] = print,
    ):  # fmt: skip
        """Waits `vllm_server_timeout` seconds for the server. EngineError where it serves another model."""
        self.url, self.timeout, self.weights_of = config.server_url, config.vllm_timeout, weights_of
        self.weights: str | None = None  # what the server calls those it has from here
        info = self._wait(config.vllm_server_timeout, note)
        self.name = f"vllm {info['vllm']} server ({info['dtype']})"
        for key in ("vocab_size", "hidden_size", "num_hidden_layers"):
            wanted = getattr(model.config, key)
            if info[key] != wanted:
                raise EngineError(
                    f"{self.url} serves {info['model']} with {key} {info[key]}, the trained model has {wanted}: "
                    "start `posttrain serve` with the model that is trained"
                )
        if info["max_model_len"] < max_model_len:
            raise EngineError(
                f"{self.url} takes {info['max_model_len']} tokens of prompt and completion, this run needs "
                f"{max_model_len}: posttrain serve ... --max_model_len {max_model_len}"
            )
        device = next(model.parameters()).device
        own, self.workers = describe_device(device), info["devices"]
        self.address = self._own_address()
        self.way = sync_way(config.vllm_sync, ipaddress.ip_address(self.address).is_loopback, own, self.workers)
        self.backend, self.group_port = backend_for(own, self.workers), config.vllm_group_port
        self.device = device if self.backend == "nccl" else torch.device("cpu")
        self.group, self.group_name = None, None
        self.name += f", weights through {self.backend if self.way == 'group' else 'shared memory'}"
        self.sync_weights(model)

    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        body = {
            "weights": self.weights,
            "prompts": prompts,
            "seeds": request_seeds(len(prompts), sampling.n, seed),
            "sampling": sampling_fields(sampling),
        }
        answer = self._request("POST", "/posttrain/generate", body)
        return [Completion(ids, logps, "stop" if r == "stop" else "length") for ids, logps, r in answer["completions"]]

    @torch.no_grad()
    def sync_weights(self, model) -> None:
        """Load `model`'s weights into the server; every process calls it, and all fail where the main one fails."""
        if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0:
            for _ in self.weights_of(model):  # where the model is sharded, gathering takes every process
                pass
            outcome = [None, None]
        else:
            outcome = self._send(model)
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(outcome, src=0)
        self.weights, error = outcome
        if error is not None:
            raise EngineError(error)

    def _send(self, model) -> list[str | None]:
        """[name of the weights, None], or [None, why they did not arrive]."""
        weights, name = self.weights_of(model), secrets.token_hex(8)
        try:
            if self.way == "group":
                self._send_to_group(weights, name)
            else:
                self._send_files(weights, name, roomy_folder(model))
            return [name, None]
        except Exception as error:  # every process raises it in sync_weights; this one alone would leave them waiting
            return [None, f"weights for {self.url}: {error if isinstance(error, EngineError) else repr(error)}"]
        finally:
            for _ in weights:  # the other processes are still gathering, and wait for this one
                pass

    def _send_files(self, weights: Iterator, name: str, place: Path) -> None:
        folder = Path(tempfile.mkdtemp(prefix=WEIGHT_FOLDER, dir=place))
        try:
            write_weights(weights, folder)
            self._request("POST", "/posttrain/load", {"weights": name, "folder": str(folder)})
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _send_to_group(self, weights: Iterator, name: str) -> None:
        """A group that failed is left; the next sync forms a new one."""
        if self.group is None:
            self.group_name = secrets.token_hex(8)
            self.group = form(
                self.address, self.group_port, len(self.workers), self.backend, self.device, self.timeout,
                lambda fields: self._request("POST", "/posttrain/group", {"group": self.group_name, **fields}),
            )  # fmt: skip
        body = {"weights": name, "group": self.group_name, "timeout": self.timeout}
        answer = in_background(lambda: self._request("POST", "/posttrain/receive", body))

        def watch() -> None:
            if answer.done():
                answer.result()

        try:
            self.group.send(weights, watch)
            answer.result()
        except Exception as error:
            self.group.close()
            self.group = None
            if isinstance(error, RuntimeError):  # a rank is gone; what comes from the server says it more plainly
                with suppress(TimeoutError):
                    answer.result(LAST_WORD)
            raise

    def _own_address(self) -> str:
        """This machine's address, as the server sees it."""
        connection = self._connect(self.timeout)
        try:
            return connection.sock.getsockname()[0]
        finally:
            connection.close()

    def _wait(self, seconds: float, note) -> dict:
        end = time.monotonic() + seconds
        told = False
        while True:
            try:
                return self._request("GET", "/posttrain/info", timeout=max(1.0, min(seconds, self.timeout)))
            except NothingAnswers as error:
                if time.monotonic() > end:
                    raise EngineError(f"{error} (waited vllm_server_timeout, {seconds:g} s)") from error
                if not told:
                    note(f"waiting up to {seconds:g} s for the vLLM server at {self.url}")
                    told = True
                time.sleep(min(CONNECT_PAUSE, seconds))

    def _request(self, method: str, path: str, body: dict | None = None, timeout: float | None = None) -> dict:
        """The answer's JSON. EngineError with the reason where none comes within `timeout` seconds."""
        timeout = timeout or self.timeout
        connection = self._connect(timeout)
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read()
        except TimeoutError as error:
            raise EngineError(
                f"the vLLM server at {self.url} did not answer {path} within {timeout:g} s (vllm_timeout): it hangs, "
                "or is too slow for so many tokens"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(
                f"the vLLM server at {self.url} went away during {path} ({type(error).__name__}): it was stopped, or "
                "ran out of memory; its own output says more"
            ) from error
        finally:
            connection.close()
        return self._read(path, response.status, text)

    def _read(self, path: str, status: int, text: bytes) -> dict:
        try:
            answer = json.loads(text)
        except ValueError:
            answer = {"error": text[:200].decode(errors="replace")}
        if status == 200 and isinstance(answer, dict) and "error" not in answer:
            return answer
        reason = answer.get("error", "") if isinstance(answer, dict) else ""
        if status in (404, 405, 501) and path == "/posttrain/info":
            reason = "what answers there is not `posttrain serve`"
        raise EngineError(f"the vLLM server at {self.url} refused {path}: HTTP {status}: {str(reason)[:400]}")

    def _connect(self, timeout: float) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        for attempt in range(CONNECT_TRIES):
            connection = http.client.HTTPConnection(parts.hostname, parts.port or 80, timeout=timeout)
            try:
                connection.connect()
                return connection
            except OSError as error:
                connection.close()
                if attempt == CONNECT_TRIES - 1:
                    raise NothingAnswers(
                        f"no vLLM server answers at {self.url} ({error.strerror or error}): start it with "
                        "`posttrain serve MODEL`, or set vllm_server_base_url"
                    ) from error
                time.sleep(CONNECT_PAUSE)


class NothingAnswers(EngineError):
    """No connection."""


def write_weights(weights: Iterator[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Safetensors files of at most about BUCKET bytes each; never more than that is held beside the model."""
    from safetensors.torch import save_file

    for number, bucket in enumerate(buckets(weights, BUCKET)):
        on_cpu = {name: tensor.cpu() for name, tensor in bucket.items()}
        save_file(on_cpu, folder / f"{number:05d}.safetensors")


def roomy_folder(model) -> Path:
    """Shared memory where the weights fit in it (containers often have 64 MB), else the folder for temporary files."""
    # a parameter that DeepSpeed has split has no elements of its own
    size = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters())
    usable = SHARED_MEMORY.is_dir() and os.access(SHARED_MEMORY, os.W_OK)
    roomy = usable and shutil.disk_usage(SHARED_MEMORY).free > 1.2 * size
    return SHARED_MEMORY if roomy else Path(tempfile.gettempdir())
