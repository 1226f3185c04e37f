"""Sampling for the terminal: one sequence, token by token, each token handed out as soon as it is drawn.

In: a causal language model, a prompt as token ids, temperature, top_p, top_k and a generator. Out: token ids with
their probabilities. `posttrain chat` and `posttrain complete` stand on it; RL samples in batches (rl/hf_sample.py).
"""

from posttrain.errors import UserError


def check_settings(temperature: float, top_p: float, max_new_tokens: int, top_k: int = 0) -> None:
    """Raises UserError for a setting out of range."""
    if not temperature >= 0:
        raise UserError(f"temperature is {temperature}; expected 0 (greedy) or more, for example 0.7")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; expected more than 0 and at most 1, for example 0.95")
    if top_k < 0:
        raise UserError(f"top_k is {top_k}; expected 0 (all tokens) or more, for example 50")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; expected 1 or more, for example 256")


def sample(
    model, prompt_ids: list[int], stop_ids: set[int], max_new_tokens: int, temperature, top_p, generator, top_k=0
):
    """Yield (token id, its probability under the model at temperature 1) until a stop token, which is yielded too.

    Raises UserError when the model's output is not a number.
    """
    import torch

    ids = torch.tensor([prompt_ids], device=model.device)  # (1, T), then (1, 1): the rest is in the KV cache
    cache = None
    for _ in range(max_new_tokens):
        with torch.inference_mode():
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        # On the CPU, so that one seed gives the same draws on every device.
        logits = output.logits[0, -1].float().cpu()  # (V,)
        if logits.isnan().any():
            raise UserError("the model's logits are not numbers (NaN): its weights are broken; use another checkpoint")
        token = choose(logits, temperature, top_p, generator, top_k)
        yield token, logits.softmax(-1)[token].item()
        if token in stop_ids:
            return
        cache, ids = output.past_key_values, torch.tensor([[token]], device=model.device)


def choose(logits, temperature: float, top_p: float, generator, top_k: int = 0) -> int:
    """Draw one token id from `logits` (V,): greedy at temperature 0, else from the smallest set of mass >= top_p among
    the `top_k` likeliest (Fan et al. 2018, arXiv:1805.04833; 0: all), their probabilities scaled to 1 in between."""
    import torch

    if temperature == 0:
        return int(logits.argmax())
    # With the largest logit at 0 a tiny temperature cannot overflow.
    probs = ((logits - logits.max()) / temperature).softmax(-1)  # (V,)
    if 0 < top_k < len(probs):
        probs[probs.argsort(descending=True, stable=True)[top_k:]] = 0
        probs /= probs.sum()
    if top_p < 1:
        ordered, order = probs.sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the mass before a token already suffices
        probs[order[outside]] = 0
    return int(torch.multinomial(probs, 1, generator=generator))
