"""A `posttrain serve` for tests in a process of its own, and what is left of one.

In: a folder for its model and its log. Out: `Server`, whose `client` is the engine under test.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from rl_helpers import tiny_tokenizer
from vllm_probe import model_of

from posttrain.rl.rollout import EngineConfig, VLLMServerEngine

HERE = Path(__file__).parent
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """`posttrain serve` of a tiny Llama; started when first needed, and again after a test that killed it.

    key: other machines may ask, too, those that know it.
    """

    def __init__(self, folder: Path, kind: str = "tied", host: str = "127.0.0.1", key: str | None = None):
        self.folder, self.kind, self.host, self.key, self.process, self.port = folder, kind, host, key, None, 0
        model_of(kind).save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")

    def start(self) -> None:
        self.port = free_port()
        flags = ["--dtype", "float32", "--max_model_len", "256", "--vllm_kv_cache_gb", "0.25"]
        env = ENV
        if self.key:
            flags += ["--host", self.host, "--allow_remote"]
            env = {**ENV, "VLLM_API_KEY": self.key}
        with open(self.folder / "log", "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "posttrain.cli", "serve", str(self.folder / "model"), "--port", str(self.port)]
                + flags, env=env, stdout=log, stderr=log,
            )  # fmt: skip

    def client(self, model=None, **keys) -> VLLMServerEngine:
        keys = {"vllm_server_host": self.host, "vllm_server_port": self.port, "vllm_timeout": 60, **keys}
        return VLLMServerEngine(EngineConfig(use_vllm="server", **keys), model or model_of(self.kind), 256)

    def running(self):
        """Itself, started where it is not."""
        if self.process is None or self.process.poll() is not None:
            self.start()
        return self

    def members(self) -> list[int]:
        """Process ids of the server and what it started."""
        listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        parents = [tuple(map(int, line.split())) for line in listing.splitlines()]
        found = [self.process.pid]
        for _ in range(3):
            found += [pid for pid, parent in parents if parent in found and pid not in found]
        return found

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)


def left_after(seconds: float, members: list[int]) -> list[int]:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(alive(pid) for pid in members):
        time.sleep(0.2)
    return [pid for pid in members if alive(pid)]


def alive(pid: int) -> bool:
    """Runs still; one that ended and that nobody has asked for its exit code does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
