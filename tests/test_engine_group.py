"""Weights through a process group of trainer and server, over gloo: what arrives, and what comes when a side breaks.

Its parts alone in three processes; then with a real `posttrain serve`. Oracles: the tensors that were sent,
transformers' plain forward and greedy decoding, and the same weights through shared memory.
"""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch
from rl_helpers import perturb, plain_logps
from server_helpers import ENV, HERE, Server
from vllm_probe import NEVER, hf_greedy, model_of, prompts

from posttrain.lora import merged_weights
from posttrain.rl import weight_group
from posttrain.rl.rollout import EngineError, Sampling
from posttrain.rl.sync import prove_sync
from posttrain.rl.weight_group import backend_for, buckets, form, join, sync_way

CPU = torch.device("cpu")


def worker(rank: int, asked, found) -> None:
    """Three rounds of weights, or what each raised."""
    fields = asked.get()
    group = join("127.0.0.1", fields["port"], rank, fields["size"], fields["backend"], CPU, fields["timeout"])
    for _ in range(3):
        try:
            found.put({name: tensor.clone() for name, tensor in group.receive(1.5)})
        except Exception as error:
            found.put(repr(error))


def test_every_rank_gets_every_weight_and_learns_of_failures(monkeypatch):
    monkeypatch.setattr(weight_group, "BUCKET", 64)  # bytes
    processes = multiprocessing.get_context("spawn")
    asked, found = ([processes.Queue() for _ in range(2)] for _ in range(2))
    workers = [processes.Process(target=worker, args=(i + 1, asked[i], found[i]), daemon=True) for i in range(2)]
    for each in workers:
        each.start()
    group = form("127.0.0.1", 0, 2, "gloo", CPU, 60, lambda fields: [queue.put(fields) for queue in asked])
    generator = torch.Generator().manual_seed(0)
    sent = {
        "larger than a bucket": torch.randn(30, 5, generator=generator),
        "odd": torch.arange(7, dtype=torch.int8),
        "one number": torch.tensor(3.0, dtype=torch.float64),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "strided": torch.randn(5, 4, generator=generator).t(),
        "empty": torch.zeros(0, 4),
    }
    group.send(sent.items(), lambda: None)
    for queue in found:
        got = queue.get(timeout=60)
        assert list(got) == list(sent)
        for name, tensor in sent.items():
            torch.testing.assert_close(got[name], tensor, atol=0, rtol=0, check_stride=False)

    def breaks_off():
        yield from list(sent.items())[:2]
        raise KeyError("no more")

    with pytest.raises(KeyError, match="no more"):
        group.send(breaks_off(), lambda: None)
    assert all("the trainer failed" in queue.get(timeout=60) for queue in found)
    assert all("silent for 1.5 s" in queue.get(timeout=60) for queue in found)
    group.close()


def test_what_a_bucket_holds():
    a, b, c = torch.zeros(4), torch.ones(4), torch.ones(100)
    parts = [list(part) for part in buckets([("a", a), ("tied", a), ("b", b), ("c", c), ("d", b)], 32)]
    assert parts == [["a", "b"], ["c"], ["d"]]
    assert list(buckets([], 32)) == []


def test_a_port_that_is_taken_and_a_server_that_refuses():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(EngineError, match="vllm_group_port: .*had"):
        form("127.0.0.1", taken.getsockname()[1], 1, "gloo", CPU, 60, lambda fields: None)

    def refuses(fields):
        raise EngineError("wrong key")

    began = time.monotonic()
    with pytest.raises(EngineError, match="wrong key"):
        form("127.0.0.1", 0, 1, "gloo", CPU, 60, refuses)
    assert time.monotonic() - began < 30, "it does not wait for workers that will not come"


@pytest.mark.parametrize(
    ("wish", "local", "own", "workers", "way"),
    [
        ("auto", True, "cpu", ["cpu"], "memory"),
        ("auto", False, "cpu", ["cpu"], "group"),
        ("auto", True, "cuda 0", ["cuda 1", "cuda 2"], "group"),
        ("auto", True, "cuda 0", ["cuda 0"], "memory"),
        ("auto", True, "cpu", ["cuda 0"], "memory"),
        ("auto", False, "cpu", ["cuda 0"], "group"),
        ("group", True, "cpu", ["cpu"], "group"),
        ("memory", True, "cuda 0", ["cuda 1"], "memory"),
        ("memory", False, "cpu", ["cpu"], "one machine.*vllm_sync: group"),
        ("group", True, "cuda 0", ["cuda 1", "cuda 0"], "share a GPU.*vllm_sync: memory"),
    ],
)
def test_which_way_weights_go(wish, local, own, workers, way):
    if way in ("group", "memory"):
        assert sync_way(wish, local, own, workers) == way
    else:
        with pytest.raises(EngineError, match=way):
            sync_way(wish, local, own, workers)


def test_nccl_only_where_all_have_a_gpu():
    assert backend_for("cuda 0", ["cuda 1", "cuda 2"]) == "nccl"
    assert backend_for("cuda 0", ["cpu"]) == backend_for("cpu", ["cuda 0"]) == "gloo"


# --- with a server

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")


def own_address() -> str | None:
    """An address of this machine that is no loopback; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        address = probe.getsockname()[0]
    return None if address.startswith("127.") else address


def samples(engine) -> list:
    return [(c.ids, c.logps) for c in engine.generate(prompts(), Sampling(3, 12, NEVER, 0.7), seed=5)]


def check_outputs(engine, model) -> None:
    """Greedy tokens are those of transformers, log-probabilities those of the plain forward."""
    greedy = engine.generate(prompts(), Sampling(1, 12, NEVER, temperature=0.0), seed=0)
    assert [c.ids for c in greedy] == hf_greedy(model, 12)
    for index, (ids, logps) in enumerate(samples(engine)):
        expected = plain_logps(model, prompts()[index // 3], ids, 0.7)
        torch.testing.assert_close(torch.tensor(logps), expected, atol=1e-4, rtol=0)


def check_two_syncs(engine, model) -> None:
    before = samples(engine)
    check_outputs(engine, model)
    for seed in (0, 1):
        perturb(model, 0.05, seed)
        engine.sync_weights(model)
        check_outputs(engine, model)
        assert samples(engine) != before
        before = samples(engine)


@pytest.mark.vllm
@needs_vllm
def test_weights_through_the_group_are_those_through_memory(server, monkeypatch):
    monkeypatch.setattr(weight_group, "BUCKET", 40_000)  # bytes: several buckets, of which layers lie across
    model = model_of("tied")
    engine = server.client(model, vllm_sync="group")
    assert engine.name.endswith("weights through gloo")
    check_two_syncs(engine, model)
    through_group = samples(engine)
    by_memory = server.client(model_of("tied"))
    assert by_memory.name.endswith("weights through shared memory")
    by_memory.sync_weights(model)
    assert samples(by_memory) == through_group


@pytest.mark.vllm
@needs_vllm
def test_another_trainers_group_is_refused(server):
    first = server.client(vllm_sync="group")
    second = server.client(vllm_sync="group")
    with pytest.raises(EngineError, match="HTTP 409.*another trainer"):
        first.sync_weights(model_of("tied"))
    assert len(second.generate([[7]], Sampling(1, 2, NEVER), seed=0)) == 1


def weights_until(event):
    """`event` comes when of one matrix of vLLM's, which holds q, k and v, a part is sent."""

    def weights(model):
        for name, weight in merged_weights(model):
            if name.endswith("layers.1.self_attn.v_proj.weight"):
                event()
            yield name, weight

    return weights


@pytest.mark.vllm
@needs_vllm
def test_a_trainer_that_fails_in_the_middle_leaves_a_server_for_the_next_sync(server, monkeypatch):
    monkeypatch.setattr(weight_group, "BUCKET", 10_000)
    model = model_of("tied")
    engine = server.client(model, vllm_sync="group")

    def fail():
        raise ValueError("a gathering failed")

    whole, engine.weights_of = engine.weights_of, weights_until(fail)
    perturb(model, 0.05)
    with pytest.raises(EngineError, match="weights for http.*a gathering failed"):
        engine.sync_weights(model)
    with pytest.raises(EngineError, match="HTTP 409.*a sync failed"):
        engine.generate([[7]], Sampling(1, 2, NEVER), seed=0)
    engine.weights_of = whole
    engine.sync_weights(model)
    check_outputs(engine, model)


KILLED = """
import os, signal, sys
from test_engine_group import weights_until, weight_group
from vllm_probe import model_of
from posttrain.rl.rollout import EngineConfig, VLLMServerEngine
weight_group.BUCKET = 10_000
config = EngineConfig(use_vllm="server", vllm_server_port=int(sys.argv[1]), vllm_sync="group")
VLLMServerEngine(config, model_of("tied"), 256, weights_until(lambda: os.kill(os.getpid(), signal.SIGKILL)))
"""


@pytest.mark.vllm
@needs_vllm
def test_a_trainer_killed_in_the_middle_leaves_a_server_for_the_next_trainer(server):
    server.client()
    dead = subprocess.run([sys.executable, "-c", KILLED, str(server.port)], env=ENV, timeout=120)
    assert dead.returncode == -signal.SIGKILL
    model = model_of("tied")
    perturb(model, 0.05)
    check_outputs(server.client(model, vllm_sync="group"), model)


@pytest.mark.vllm
@needs_vllm
def test_a_server_that_stands_still_ends_in_the_time_out(server):
    engine = server.client(vllm_sync="group", vllm_timeout=1.5)
    os.kill(server.process.pid, signal.SIGSTOP)
    began = time.monotonic()
    try:
        with pytest.raises(EngineError, match="did not answer /posttrain/receive within 1.5 s"):
            engine.sync_weights(model_of("tied"))
        with pytest.raises(EngineError, match="did not answer /posttrain/group within 1.5 s"):
            engine.sync_weights(model_of("tied"))
        assert time.monotonic() - began < 15
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    model = model_of("tied")
    assert prove_sync(server.client(model, vllm_sync="group"), model, prompts(), bound=1.001, seed=0) < 1.0001


@pytest.mark.vllm
@needs_vllm
def test_a_server_killed_in_the_middle_of_a_sync(server, monkeypatch):
    monkeypatch.setattr(weight_group, "BUCKET", 10_000)
    model = model_of("tied")
    engine = server.client(model, vllm_sync="group")
    engine.weights_of = weights_until(lambda: os.kill(server.process.pid, signal.SIGKILL))
    began = time.monotonic()
    with pytest.raises(EngineError, match="weights for http.*went away during /posttrain/receive"):
        engine.sync_weights(model)
    assert time.monotonic() - began < 20
    server.process.wait(30)


@pytest.mark.vllm
@needs_vllm
def test_another_machine_sends_weights_with_the_key_alone(started, tmp_path, monkeypatch):
    """The server listens on an address that is no loopback: it takes this machine for another one."""
    address = own_address()
    if address is None:
        pytest.skip("this machine has no address but loopback")
    started.stop()  # one at a time
    server = Server(tmp_path, "untied", address, "a-key")
    monkeypatch.setenv("VLLM_API_KEY", "another-key")
    try:
        server.start()
        with pytest.raises(EngineError, match="HTTP 401.*VLLM_API_KEY"):
            server.client()
        monkeypatch.setenv("VLLM_API_KEY", "a-key")
        with pytest.raises(EngineError, match="vllm_sync: memory needs .* one machine"):
            server.client(vllm_sync="memory")
        model = model_of("untied")
        engine = server.client(model)
        assert engine.name.endswith("weights through gloo")
        check_two_syncs(engine, model)
        monkeypatch.setenv("VLLM_API_KEY", "another-key")
        began = time.monotonic()
        with pytest.raises(EngineError, match="HTTP 401.*VLLM_API_KEY"):
            engine.sync_weights(model)
        assert time.monotonic() - began < 30, "half of vllm_timeout: nothing waits for workers that do not take part"
    finally:
        server.stop()


@pytest.mark.vllm
@needs_vllm
def test_the_benchmark_in_its_smallest_size(started, tmp_path):
    """Its figures follow from one another; and weights go both ways."""
    started.stop()
    script = HERE / "benchmarks" / "weight_sync.py"
    flags = ["--sizes", "tiny", "--syncs", "2", "--out", str(tmp_path / "found.json")]
    done = subprocess.run([sys.executable, script, *flags], env=ENV, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["way"] for row in rows] == ["group", "memory"]
    for row in rows:
        assert row["GB"] * 1e9 == 4 * sum(p.numel() for p in model_of("tied").parameters())
        assert len(row["each ms"]) == 2 and row["ms"] == pytest.approx(sum(row["each ms"]) / 2)
        assert row["GB/s"] == pytest.approx(row["GB"] / row["ms"] * 1000)
        assert f"| tiny | {row['way']} | " in done.stdout
