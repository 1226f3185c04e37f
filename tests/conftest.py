"""Shared by the tests: a real tokenizer and a small random model, made once by the package's own first two stages."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

# Before torch is imported: threads that spin for each other make these small models many times slower on busy cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).parent.parent
CHATML = str(REPOSITORY / "chat_templates" / "chatml.jinja")


@pytest.fixture(scope="session")
def base_tokenizer():
    """Byte-level BPE of 700 tokens, trained on 300 of tiny's documents; no chat template."""
    from posttrain.data import tiny
    from posttrain.tokenizer import train_tokenizer

    return train_tokenizer((row["text"] for row in tiny.rows("documents", "train", 300, seed=0)), 700)


def new_llama(tokenizer):
    """Two layers, 32 wide, 1024 positions, random weights of a fixed seed."""
    import torch

    from posttrain.shapes import ShapeConfig, make_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_model(ShapeConfig(32, 64, 2, 2, 1024), tokenizer).eval()


@pytest.fixture(scope="session")
def tokenizer(base_tokenizer):
    """The same with the ChatML template. Do not change it: it is shared."""
    from copy import deepcopy

    from posttrain.chat import set_template

    tokenizer = deepcopy(base_tokenizer)
    set_template(tokenizer, new_llama(tokenizer), CHATML)
    return tokenizer


@pytest.fixture(scope="session")
def model(tokenizer):
    """Do not change its weights: it is shared."""
    return new_llama(tokenizer)


@pytest.fixture
def fresh_model(tokenizer):
    return new_llama(tokenizer)


@pytest.fixture
def restored_signals():
    """A stage installs handlers of its own; the test session gets its old ones back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


KILL_DRIVER = """
import os, shutil, signal, sys
from pathlib import Path

{body}

def kill_at(number, folder):
    # Python announces every file operation before it makes it: the n-th one under `folder` is where the process dies.
    seen = 0
    def hook(event, args):
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "test.halfway"):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)

root, number = Path(sys.argv[1]), 0
while True:
    number += 1
    folder = root / str(number)
    before(folder)
    child = os.fork()
    if child == 0:
        kill_at(number, folder)
        action(folder)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status != signal.SIGKILL:
        sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.fixture
def kill_everywhere(tmp_path):
    """`kill_everywhere(body)`: `body` defines before(folder) and action(folder). Prepares a folder anew for each file
    operation of `action` and kills a process (SIGKILL) just before that operation. Returns the folders, the last one
    of an action that ran to its end."""

    def run(body: str) -> list[Path]:
        script = KILL_DRIVER.format(body=textwrap.dedent(body))
        root = tmp_path / "killed"
        root.mkdir()
        done = run_script(script, str(root))
        assert done.returncode == 0, done.stderr
        return sorted(root.iterdir(), key=lambda folder: int(folder.name))

    return run


def run_script(script: str, *arguments: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.fixture(scope="session")
def small_chain(tmp_path_factory) -> Path:
    """A finished run of recipes/tiny with small settings, tokenizer to GRPO, made by `posttrain run`. Read only."""
    from recipe_runs import posttrain, small_settings

    out = tmp_path_factory.mktemp("chain") / "small"
    done = posttrain("run", "recipes/tiny", "--out", out, *small_settings())
    assert done.returncode == 0, done.stdout + done.stderr
    (out / "said.txt").write_text(done.stdout)
    return out


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A `posttrain serve` of a tiny Llama, for a test that wants to stop it; `server` is sure to run."""
    from server_helpers import Server

    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


@pytest.fixture
def server(started):
    return started.running()
