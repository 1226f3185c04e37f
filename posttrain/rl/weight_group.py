"""Weights from a trainer to the workers of a vLLM server through a process group of their own: NCCL or gloo.

In: (name, whole tensor) at rank 0, the trainer's main process. Out: the same at every other rank, 1 + a worker's rank.
The group is neither the trainer's default group nor vLLM's, of which a process has one each: it is a bare backend of
torch.distributed over a store that rank 0 opens. NCCL where all ranks have a GPU, else gloo; all but its name is the
same.

A bucket is two broadcasts: two int64 (bytes of a JSON header, bytes of all), then header and weights as one uint8
tensor. END or FAILED in place of the first number ends a round.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed

from posttrain.rl.engine import EngineError

BUCKET = 256 * 2**20  # bytes; also what a worker holds beside its model
END, FAILED = 0, -1
ALIGNMENT = 16  # bytes; a tensor's first byte in a bucket is at a multiple of its element size
PAUSE = 0.0003  # seconds between two looks at what other processes do
HINT = (
    "both machines must reach each other at any port; where a machine's name or first interface leads elsewhere, set "
    "NCCL_SOCKET_IFNAME (GPUs) or GLOO_SOCKET_IFNAME (CPU) to the right interface on both"
)


class WeightGroup:
    """One rank of the group. What it raises where another rank is gone is torch's RuntimeError."""

    def __init__(self, store, rank: int, size: int, backend: str, device: torch.device, timeout: float):
        """Returns once all `size` ranks are there. RuntimeError where they are not within `timeout` seconds."""
        self.store, self.rank, self.size, self.device, self.rounds = store, rank, size, device, 0
        with kept_alive():
            self.backend = kind_of(backend)(store, rank, size, timeout=timedelta(seconds=timeout))
        first = torch.full((1,), size if rank == 0 else 0, dtype=torch.int64, device=device)
        self._broadcast(first, deadline(timeout))  # NCCL connects with the first one
        if first.item() != size:
            raise RuntimeError(f"a weight group of {first.item()} ranks, expected {size}")

    def send(self, weights: Iterable[tuple[str, torch.Tensor]], watch: Callable[[], None]) -> None:
        """Rank 0: all weights to all other ranks. `watch` is called while waiting, and ends it by raising.

        What `weights` itself raises, the others learn first.
        """
        self.rounds += 1
        # A broadcast that nobody takes holds gloo up until its time-out, `close` included: none before all are ready.
        ready = [f"round {self.rounds}: rank {rank}" for rank in range(1, self.size)]
        until(lambda: self.store.check(ready), watch)
        parts = buckets(weights, BUCKET)
        while True:
            try:
                bucket = next(parts, None)
            except BaseException:
                self._lengths(FAILED, 0, watch)
                raise
            if bucket is None:
                self._lengths(END, 0, watch)
                return
            header, whole = packed(bucket, self.device)
            self._lengths(header, len(whole), watch)
            self._broadcast(whole, watch)

    def receive(self, timeout: float) -> Iterator[tuple[str, torch.Tensor]]:
        """Other ranks: one round of weights. TimeoutError where a bucket takes longer than `timeout` seconds."""
        self.rounds += 1
        self.store.set(f"round {self.rounds}: rank {self.rank}", "ready")
        while True:
            header, size = self._lengths(0, 0, deadline(timeout))
            if header == END:
                return
            if header == FAILED:
                raise RuntimeError("the trainer failed while it sent its weights")
            whole = torch.empty(size, dtype=torch.uint8, device=self.device)
            self._broadcast(whole, deadline(timeout))
            yield from unpacked(header, whole)

    def close(self) -> None:
        """Give up what is under way and let go of the other ranks."""
        self.backend.abort()
        self.backend = None

    def _lengths(self, header: int, size: int, watch) -> list[int]:
        lengths = torch.tensor([header, size], dtype=torch.int64, device=self.device)
        self._broadcast(lengths, watch)
        return lengths.tolist()

    def _broadcast(self, tensor: torch.Tensor, watch: Callable[[], None]) -> None:
        """From rank 0, in place; through when it returns, so that the memory can be used again."""
        options = distributed.BroadcastOptions()
        options.rootRank = 0
        work = self.backend.broadcast([tensor], options)
        until(work.is_completed, watch)
        work.wait()  # it raises what went wrong


def form(
    host: str, port: int, workers: int, backend: str, device: torch.device, timeout: float,
    ask: Callable[[dict], object],
) -> WeightGroup:  # fmt: skip
    """Rank 0's side of a new group with the `workers` of a server.

    host: this machine's address as the server reaches it; port: for the store, 0 for any free one. `ask` tells the
    server what `join` needs, and returns when its workers have joined. What it raises is raised here.
    """
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise EngineError(f"vllm_group_port: {host}:{port} cannot be had ({error.strerror})") from error
    port = listener.getsockname()[1]
    seconds = timedelta(seconds=timeout)
    store = distributed.TCPStore(
        host, port, is_master=True, wait_for_workers=False, timeout=seconds, master_listen_fd=listener.detach()
    )
    answer = in_background(lambda: ask({"port": port, "size": workers + 1, "backend": backend, "timeout": timeout}))

    def watch() -> None:
        if answer.done():
            answer.result()

    def connect() -> WeightGroup:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # each thread has its own
        return WeightGroup(store, 0, workers + 1, backend, device, timeout)

    # Only when all have come: a backend's constructor waits without a look at whether anybody will.
    until(lambda: store.check([arrival(rank) for rank in range(1, workers + 1)]), watch)
    group = in_background(connect)
    until(group.done, watch)
    try:
        answer.result()
        return group.result()
    except RuntimeError as error:
        raise EngineError(f"the weight group ({backend}) cannot connect: {first_line(error)}; {HINT}") from error


def join(
    host: str, port: int, rank: int, size: int, backend: str, device: torch.device, timeout: float
) -> WeightGroup:  # fmt: skip
    """The side of rank 1 and more. RuntimeError where the store or the other ranks cannot be reached."""
    seconds = timedelta(seconds=timeout)
    store = distributed.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=seconds)
    store.set(arrival(rank), "here")
    return WeightGroup(store, rank, size, backend, device, timeout)


def sync_way(wish: str, local: bool, own: str, workers: list[str]) -> str:
    """How weights travel, "group" or "memory". wish: the key vllm_sync; own, workers: what `describe_device` gives.

    EngineError for a wish that cannot be: memory between machines, a group of ranks that share a GPU.
    """
    shared = own != "cpu" and own in workers
    if wish == "memory" and not local:
        raise EngineError("vllm_sync: memory needs trainer and server on one machine; use vllm_sync: group")
    if (wish == "group" or not local) and shared:
        raise EngineError(
            "vllm_sync: group, but trainer and server share a GPU, which NCCL refuses: use vllm_sync: memory, or give "
            "each its own in CUDA_VISIBLE_DEVICES"
        )
    if wish != "auto":
        return wish
    return "memory" if local and (shared or backend_for(own, workers) == "gloo") else "group"


def backend_for(own: str, workers: list[str]) -> str:
    """NCCL needs a GPU at every rank."""
    return "gloo" if "cpu" in (own, *workers) else "nccl"


def describe_device(device: torch.device) -> str:
    """ "cpu", or "cuda" and the GPU's own id, which is the same for all processes."""
    return f"cuda {torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else "cpu"


def buckets(weights: Iterable[tuple[str, torch.Tensor]], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Weights side by side, contiguous, in parts of `size` bytes or of one larger tensor."""
    bucket: dict[str, torch.Tensor] = {}
    places, held = set(), 0
    for name, tensor in weights:
        whole = tensor.detach().contiguous()
        if whole.nbytes and whole.data_ptr() in places:
            continue  # tied weights have two names; checkpoints hold them once
        if bucket and held + whole.nbytes > size:
            yield bucket
            bucket, places, held = {}, set(), 0
        bucket[name] = whole
        places.add(whole.data_ptr())
        held += whole.nbytes
    if bucket:
        yield bucket


def packed(bucket: dict[str, torch.Tensor], device: torch.device) -> tuple[int, torch.Tensor]:
    """(bytes of the header, header and weights as one uint8 tensor on `device`)."""
    entries = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in bucket.items()]
    header = json.dumps(entries).encode()
    ends, end = [], aligned(len(header))
    for tensor in bucket.values():
        ends.append(end)
        end += aligned(tensor.nbytes)
    whole = torch.empty(end, dtype=torch.uint8, device=device)
    whole[: len(header)] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
    for start, tensor in zip(ends, bucket.values(), strict=True):
        whole[start : start + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8)
    return len(header), whole


def unpacked(header: int, whole: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a packed bucket, in place."""
    start = aligned(header)
    for name, kind, shape in json.loads(whole[:header].cpu().numpy().tobytes()):
        dtype = getattr(torch, kind)
        size = torch.Size(shape).numel() * dtype.itemsize
        yield name, whole[start : start + size].view(dtype).view(shape)
        start += aligned(size)


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def kind_of(backend: str) -> type:
    """torch's class of that name; builds without CUDA have no NCCL."""
    return distributed.ProcessGroupGloo if backend == "gloo" else distributed.ProcessGroupNCCL


@contextmanager
def kept_alive():
    """NCCL's watchdog ends the process where another rank is gone, unless this stands in the environment when a group
    is made. The trainer shall save a checkpoint, the server wait for another trainer."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def arrival(rank: int) -> str:
    return f"rank {rank} is here"


def in_background(function: Callable[[], object]) -> Future:
    """Its result, from a thread that does not hold up the end of the process."""
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # it is raised again where the result is asked for
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def until(done: Callable[[], bool], watch: Callable[[], None]) -> None:
    while not done():
        watch()
        time.sleep(PAUSE)


def deadline(seconds: float) -> Callable[[], None]:
    """Raises TimeoutError when called after that time."""
    end = time.monotonic() + seconds

    def watch() -> None:
        if time.monotonic() > end:
            raise TimeoutError(f"the other side of the weight group was silent for {seconds:g} s")

    return watch


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:300]
