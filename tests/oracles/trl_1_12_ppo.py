"""What TRL 1.12's PPO computes on small random tensors: writes trl_1_12_ppo.json beside this file.

Out: for each case inputs (log-probabilities, values, scores, lengths) and outputs (rewards, advantages, returns,
losses, gradients), (B, T) lists in double precision. The numbers come from the statements of `PPOTrainer.train`
itself, taken out of its source (statements.py) and executed on the inputs: `missing_eos_penalty` to the whitened
advantages, then one minibatch from the masked new log-probabilities to the total loss and the clip shares.

TRL 1.12.0 is the last with PPO and is not installed here; one run in a folder of its own:

    pip install --target /tmp/trl112 --no-deps trl==1.12.0
    PYTHONPATH=/tmp/trl112 python tests/oracles/trl_1_12_ppo.py
"""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from statements import run_between

PAD, EOS, ROWS, STEPS = 0, 1, 5, 9
LENGTHS = [9, 4, 1, 8, 6]  # tokens of each response, the end token included; the first never ends
CASES = [
    {"kl_estimator": "k1", "whiten_rewards": False, "gamma": 1.0, "lam": 0.95, "kl_coef": 0.05},
    {"kl_estimator": "k3", "whiten_rewards": False, "gamma": 0.97, "lam": 0.9, "kl_coef": 0.3},
    {"kl_estimator": "k1", "whiten_rewards": True, "gamma": 1.0, "lam": 1.0, "kl_coef": 0.1},
]
COMMON = {"missing_eos_penalty": 1.5, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1}


def random_inputs(seed: int) -> dict:
    """Log-probabilities of policy, reference and updated policy, values before and after, scores; four decimals."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale * 1e4).round() / 1e4

    logps, values = draw(ROWS, STEPS) - 2, draw(ROWS, STEPS)
    return {
        "logps": logps,
        "ref_logps": logps + draw(ROWS, STEPS, scale=0.4),
        "new_logps": logps + draw(ROWS, STEPS, scale=0.3),
        "values": values,
        "new_values": values + draw(ROWS, STEPS, scale=0.3),
        "scores": draw(ROWS),
    }


def responses() -> torch.Tensor:
    ids = torch.full((ROWS, STEPS), PAD)
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = 7
        if row:
            ids[row, length - 1] = EOS
    return ids


def rollout_part(train, args, inputs: dict) -> dict:
    ids = responses()
    names = {
        "self": SimpleNamespace(args=args, processing_class=SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD)),
        "args": args, "responses": ids, "postprocessed_responses": ids,
        "sequence_lengths": torch.tensor(LENGTHS) - 1,  # TRL's is the index of the last token
        "logprobs": inputs["logps"].clone(), "ref_logprobs": inputs["ref_logps"].clone(),
        "values": inputs["values"].clone(), "scores": inputs["scores"].clone(),
    }  # fmt: skip
    names = run_between(train, "contain_eos_token =", "returns =", names)
    names["gae_advantages"] = names["advantages"].clone()
    return run_between(train, "advantages = masked_whiten", "advantages = torch.masked_fill", names)


def update_part(train, args, inputs: dict, rollout: dict) -> tuple[dict, dict]:
    """The names after one minibatch of all rows, and the gradients of its loss."""
    new_logps, new_values = inputs["new_logps"].requires_grad_(), inputs["new_values"].requires_grad_()
    everything = torch.arange(ROWS)
    names = rollout | {
        "micro_batch_inds": everything, "mb_advantage": rollout["advantages"], "mb_logprobs": rollout["logprobs"],
        "mb_return": rollout["returns"], "mb_values": rollout["values"], "new_logprobs": new_logps,
        "vpred_temp": torch.nn.functional.pad(new_values, (0, 1))[:, :, None], "context_length": 1,
    }  # fmt: skip
    names = run_between(train, "new_logprobs = torch.masked_fill", "loss =", names)
    names["loss"].backward()
    names = run_between(train, "pg_clipfrac =", "pg_clipfrac =", names)
    return names, {"new_logps": new_logps.grad, "new_values": new_values.grad}


def main() -> None:
    import trl
    from trl.experimental.ppo import PPOTrainer

    assert trl.__version__ == "1.12.0", trl.__version__
    cases = []
    for seed, settings in enumerate(CASES):
        args, inputs = SimpleNamespace(**settings, **COMMON), random_inputs(seed)
        rollout = rollout_part(PPOTrainer.train, args, inputs)
        update, gradients = update_part(PPOTrainer.train, args, inputs, rollout)
        outputs = {key: rollout[key] for key in ("rewards", "gae_advantages", "returns", "advantages")}
        outputs["penalised_scores"] = rollout["scores"]
        outputs |= {key: update[key] for key in ("pg_loss", "vf_loss", "loss", "pg_clipfrac", "vf_clipfrac")}
        outputs |= {f"gradient_{key}": value for key, value in gradients.items()}
        cases.append(
            {
                "settings": vars(args),
                "lengths": LENGTHS,
                "inputs": {key: rounded(value.tolist()) for key, value in inputs.items()},
                "outputs": {key: rounded(value.tolist()) for key, value in outputs.items()},
            }
        )
    text = json.dumps({"trl": trl.__version__, "cases": cases}, indent=None).replace('], "', '],\n"')
    Path(__file__).with_suffix(".json").write_text(text + "\n")


def rounded(value):
    return [rounded(v) for v in value] if isinstance(value, list) else round(value, 12)


if __name__ == "__main__":
    main()
