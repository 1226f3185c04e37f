"""Sampling from the trainer's own module with transformers' cache, and log-probabilities under it.

In: prompts as token ids. Out: completions as token ids with their log-probabilities. No other process, no second copy
of the weights; slower than vLLM.
"""

from importlib import metadata

import torch

from posttrain.layouts import Layout, head_size
from posttrain.packing import by_tokens
from posttrain.rl.engine import Sampling, sample_seed
from posttrain.rl.forward import rollout_logps
from posttrain.rl.hf_sample import can_sample, cut, sample
from posttrain.rl.types import Completion, Rollouts

CACHE_BYTES = 2**31  # memory for keys and values of a batch; more prompts go in several batches


class HFEngine:
    """Our loop over transformers' cache (rl/hf_sample.py), or transformers' `generate` for models that keep more than
    keys and values. On the trainer's own module, so always in sync."""

    concurrent = False  # it reads the weights that training writes

    def __init__(self, model, pad_id: int):
        self.model, self.pad_id = model, pad_id
        self.plain = can_sample(model)
        self.name = f"transformers {metadata.version('transformers')}" + ("" if self.plain else " generate")

    def sync_weights(self, model) -> None:
        """The trainer's module is the engine's: nothing travels, unless another model is handed in."""
        self.model = model

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        from transformers import GenerationConfig

        was_training, own = self.model.training, self.model.generation_config
        self.model.eval()
        self.model.generation_config = GenerationConfig()  # a checkpoint's repetition penalty would bias the samples
        completions = (self._sample if self.plain else self._generate)(prompts, sampling, seed)
        self.model.train(was_training)
        self.model.generation_config = own
        return completions

    def _sample(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = 2 * config.num_hidden_layers * heads * head_size(config)  # numbers of a token's keys and values
        bytes_each = size * self.model.dtype.itemsize
        most = CACHE_BYTES // (sampling.n * bytes_each)  # tokens of prompts with room for one completion each
        batches = by_tokens([len(p) + sampling.max_tokens for p in prompts], max(1, most))
        completions: list[Completion | None] = [None] * (len(prompts) * sampling.n)
        for number, batch in enumerate(batches):
            batch = sorted(batch)
            chosen = [prompts[i] for i in batch]
            found = iter(sample(self.model, chosen, sampling, self.pad_id, sample_seed(seed, number)))
            for index in batch:
                completions[index * sampling.n : (index + 1) * sampling.n] = [next(found) for _ in range(sampling.n)]
        return completions

    def _generate(self, prompts: list[list[int]], sampling: Sampling, seed: int) -> list[Completion]:
        repeated = [p for p in prompts for _ in range(sampling.n)]
        completions: list[Completion | None] = [None] * len(repeated)
        lengths = [len(p) + sampling.max_tokens for p in repeated]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for batch in by_tokens(lengths, max_tokens=64 * max(lengths)):
                for index, completion in zip(batch, self._batch([repeated[i] for i in batch], sampling), strict=True):
                    completions[index] = completion
        return completions

    def _batch(self, prompts: list[list[int]], sampling: Sampling) -> list[Completion]:
        device, width = self.model.device, max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        greedy = sampling.temperature == 0
        chosen = (
            {} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        )
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=sampling.max_tokens,
            do_sample=not greedy,
            eos_token_id=list(sampling.stop_ids),
            pad_token_id=self.pad_id,
            **chosen,
        )
        completions = [cut(row, [], sampling.stop_ids) for row in output[:, width:].tolist()]
        logps = model_logps(self.model, prompts, [c.ids for c in completions], sampling.temperature or 1.0)
        for completion, values in zip(completions, logps, strict=True):
            completion.logps = values.tolist()
        return completions


def model_logps(model, prompts, completions, temperature: float, max_tokens: int = 8192) -> list[torch.Tensor]:
    """Log-probabilities (T_i,) of completions under `model`, from packed forwards; on the CPU, float32."""
    whole = [Completion(ids, [], "length") for ids in completions]
    rollouts = Rollouts([{}] * len(prompts), prompts, whole, 1)
    return rollout_logps(model, rollouts, Layout("packed"), temperature, max_tokens)
