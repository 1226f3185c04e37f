"""Run a real vLLM engine beside a trainer's model and write down what both say. One engine lives in a process, so
tests run this file: `python tests/vllm_probe.py tied|untied|lora RESULT.json`.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from rl_helpers import perturb, tiny_llama, tiny_tokenizer

from posttrain.lora import LoraArgs, add_adapter
from posttrain.rl.rollout import EngineConfig, Sampling, VLLMEngine

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
    """A tiny Llama: tied, untied, or tied with LoRA adapters and trained rows of its embeddings."""
    model = tiny_llama(seed=2, tied=kind != "untied")
    if kind == "lora":
        add_adapter(model, LoraArgs(use_peft=True, lora_r=4), token_ids=[5, 6])
    return model


def main(kind: str, result: str) -> None:
    tokenizer, model = tiny_tokenizer(), model_of(kind)
    tokenizer.save_pretrained(Path(result).with_suffix(""))
    threads = torch.get_num_threads()
    torch.manual_seed(123)
    state = torch.get_rng_state()
    with tempfile.TemporaryDirectory() as scratch:
        config = EngineConfig(vllm_kv_cache_gb=0.25)
        engine = VLLMEngine(config, model, tokenizer, max_model_len=256, seed=0, scratch=Path(scratch))
        left = [path.name for path in Path(scratch).iterdir()]
    untouched = bool(torch.equal(state, torch.get_rng_state()))
    found = {
        "rng_untouched": untouched,
        "name": engine.name,
        "left_in_scratch": left,
        "threads": [threads, torch.get_num_threads()],
    }
    found["before"] = facts(engine, model)
    # the fourth token of some replies ends every reply now: the engine must stop at its first occurrence
    free = engine.generate(prompts(), Sampling(2, 12, NEVER), seed=1)
    stop = tuple({c.ids[3] for c in free[:4]})
    found["free"] = [c.ids for c in free]
    stopped = engine.generate(prompts(), Sampling(2, 12, stop), seed=1)
    found["stopped"] = {"stop_ids": stop, "completions": [[c.ids, c.stop] for c in stopped]}
    for key, seed in {"seed_5": 5, "seed_5_again": 5, "seed_6": 6}.items():
        found[key] = [c.ids for c in engine.generate(prompts(), Sampling(4, 10, NEVER), seed=seed)]
    perturb(model, 0.05)
    found["stale"] = facts(engine, model)
    engine.sync_weights(model)
    found["synced"] = facts(engine, model)
    torch.save(model.state_dict(), Path(result).with_suffix(".pt"))
    for round_ in (1, 2):
        perturb(model, 0.05, seed=round_)
        engine.sync_weights(model)
    found["synced_again"] = facts(engine, model)
    torch.save(model.state_dict(), Path(result).with_suffix(".again.pt"))
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
