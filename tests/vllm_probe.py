"""Run a real vLLM engine beside a trainer's model and write down what both say. One engine lives in a process, so
tests run this file: `python tests/vllm_probe.py KIND RESULT.json`, or call `probe_result`. Kinds: see `model_of`;
"compiled" is the tied model in a compiled engine.

At its end the engine is made to pass its time-out, so that the process ends with 2.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from functools import cache
from pathlib import Path

import torch
from rl_helpers import perturb, tiny_llama, tiny_tokenizer

from posttrain.errors import UserError
from posttrain.lora import LoraArgs, add_adapter
from posttrain.rl.rollout import EngineConfig, Sampling, VLLMEngine
from posttrain.rl.sync import prove_sync

NEVER = ()  # nothing stops a reply: outputs are as long as asked


def prompts() -> list[list[int]]:
    """Short and long ones, two of them with a common beginning that the engine caches."""
    generator = torch.Generator().manual_seed(7)
    long = torch.randint(5, 255, (200,), generator=generator).tolist()
    return [[7], [20, 21, 22, 23], long, long[:180] + [9] * 20]


def hf_greedy(model, tokens: int) -> list[list[int]]:
    outputs = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        outputs.append(output[0, len(prompt) :].tolist())
    return outputs


def facts(engine, model) -> dict:
    """Greedy tokens of both, and sampled tokens with the engine's log-probabilities."""
    greedy = engine.generate(prompts(), Sampling(1, 12, NEVER, temperature=0.0), seed=0)
    sampled = engine.generate(prompts(), Sampling(3, 12, NEVER, temperature=0.7), seed=5)
    return {
        "engine": [c.ids for c in greedy],
        "hf": hf_greedy(model, 12),
        "sampled": [{"ids": c.ids, "logps": c.logps, "stop": c.stop} for c in sampled],
    }


def model_of(kind: str):
    """A tiny Llama: tied, untied, tied with LoRA adapters and trained rows of its embeddings, or adapters alone."""
    model = tiny_llama(seed=2, tied=kind != "untied")
    if kind in ("lora", "adapter"):
        add_adapter(model, LoraArgs(use_peft=True, lora_r=4), token_ids=[5, 6] if kind == "lora" else [])
    return model


def train(model, kind: str, seed: int = 0) -> None:
    """Change what training would: all weights, or where the base stays in the engine the adapters alone."""
    if kind != "adapter":
        return perturb(model, 0.05, seed)
    perturb(torch.nn.ParameterList(p for p in model.parameters() if p.requires_grad), 0.05, seed)


def proof(engine, model) -> float | str:
    """What prove_sync gives, or the text of its error."""
    try:
        return prove_sync(engine, model, prompts(), bound=1.01, seed=3)
    except UserError as error:
        return str(error)


def in_the_background(engine, model) -> dict:
    """The same completions from another thread while this one trains; and what that leaves of torch's state."""
    sampling = Sampling(4, 10, NEVER)
    ids = torch.tensor([prompts()[2]])

    def gradient():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    alone, box = gradient(), []
    torch.manual_seed(11)
    state = torch.get_rng_state()
    thread = threading.Thread(target=lambda: box.append(engine.generate(prompts(), sampling, seed=5)))
    thread.start()
    beside = [gradient() for _ in range(3)]
    thread.join()
    model.zero_grad()
    return {
        "ids": [c.ids for c in box[0]],
        "gradients": all(torch.equal(a, b) for grads in beside for a, b in zip(alone, grads, strict=True)),
        "rng": bool(torch.equal(state, torch.get_rng_state())),
        "grad_mode": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
    }


def with_vllms_own_noise(engine) -> dict:
    """vLLM's sampler as it comes draws the same samples, and moves torch's random state."""
    ours = engine.generate(prompts(), Sampling(3, 12, NEVER), seed=4)
    [sampler] = engine.llm.collective_rpc(lambda worker: worker.model_runner.sampler.topk_topp_sampler)
    mended, sampler.forward = sampler.forward, sampler.forward_cpu
    state = torch.get_rng_state()
    theirs = engine.generate(prompts(), Sampling(3, 12, NEVER), seed=4)
    sampler.forward = mended
    return {
        "same": [(c.ids, c.logps) for c in ours] == [(c.ids, c.logps) for c in theirs],
        "moves_state": not torch.equal(state, torch.get_rng_state()),
    }


def past_the_time_out(engine) -> dict:
    """A generation that takes longer than the engine may, and the call after it."""
    engine.watchdog.timeout, began, texts = 0.2, time.monotonic(), []
    for _ in range(2):
        try:
            engine.generate(prompts()[:2] * 100, Sampling(8, 200, NEVER), seed=0)
        except UserError as error:
            texts.append(str(error))
    return {"texts": texts, "seconds": time.monotonic() - began}


def main(kind: str, result: str) -> None:
    tokenizer, model = tiny_tokenizer(), model_of(kind)
    tokenizer.save_pretrained(Path(result).with_suffix(""))
    threads = torch.get_num_threads()
    torch.manual_seed(123)
    state = torch.get_rng_state()
    with tempfile.TemporaryDirectory() as scratch:
        lora, eager = "adapter" if kind == "adapter" else "merge", kind != "compiled"
        config = EngineConfig(vllm_kv_cache_gb=0.25, vllm_lora=lora, vllm_enforce_eager=eager)
        engine = VLLMEngine(config, model, tokenizer, max_model_len=256, seed=0, scratch=Path(scratch))
        left = [path.name for path in Path(scratch).iterdir()]
    found = {"name": engine.name, "left_in_scratch": left, "threads": [threads, torch.get_num_threads()]}
    found["cache_bytes"] = engine.llm.llm_engine.vllm_config.cache_config.kv_cache_memory_bytes
    found["before"] = facts(engine, model)
    # the fourth token of some replies ends every reply now: the engine must stop at its first occurrence
    free = engine.generate(prompts(), Sampling(2, 12, NEVER), seed=1)
    stop = tuple({c.ids[3] for c in free[:4]})
    found["free"] = [c.ids for c in free]
    stopped = engine.generate(prompts(), Sampling(2, 12, stop), seed=1)
    found["stopped"] = {"stop_ids": stop, "completions": [[c.ids, c.stop] for c in stopped]}
    for key, seed in {"seed_5": 5, "seed_5_again": 5, "seed_6": 6}.items():
        found[key] = [c.ids for c in engine.generate(prompts(), Sampling(4, 10, NEVER), seed=seed)]
    found["rng_untouched"] = bool(torch.equal(state, torch.get_rng_state()))
    found["background"], found["noise"] = in_the_background(engine, model), with_vllms_own_noise(engine)
    train(model, kind)
    found["stale"], found["proof_stale"] = facts(engine, model), proof(engine, model)
    engine.sync_weights(model)
    found["synced"], found["proof"] = facts(engine, model), proof(engine, model)
    torch.save(model.state_dict(), Path(result).with_suffix(".pt"))
    for round_ in (1, 2):
        train(model, kind, seed=round_)
        engine.sync_weights(model)
    found["synced_again"] = facts(engine, model)
    torch.save(model.state_dict(), Path(result).with_suffix(".again.pt"))
    if kind == "tied":
        train(model, kind, seed=3)
        engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": engine.weights_of(model)})
        found["proof_stale_head"] = proof(engine, model)  # all weights but the head's packed copy are new
    found["late"] = past_the_time_out(engine)
    Path(result).write_text(json.dumps(found))


@cache
def probe_result(kind: str, folder: Path) -> tuple[dict, dict]:
    """What a run of this file wrote down, and the trainer's models when it did: before, synced, synced_again."""
    result, here = folder / "result.json", Path(__file__).parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, __file__, kind, str(result)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-3000:]
    models = {"before": model_of(kind)}
    for key, suffix in {"synced": ".pt", "synced_again": ".again.pt"}.items():
        models[key] = model_of(kind)
        models[key].load_state_dict(torch.load(result.with_suffix(suffix), weights_only=True))
    return json.loads(result.read_text()), models


if __name__ == "__main__":
    main(*sys.argv[1:])
