"""RL on two processes: the same experience gives the same update as on one, whatever is whitened or averaged.

Run: pytest tests/test_rl_processes.py
"""

import json
import sys

import pytest
from recipe_runs import call

pytestmark = pytest.mark.slow
LAUNCH = [
    sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_machines", "1", "--main_process_port", "0",
    "--mixed_precision", "no", "--dynamo_backend", "no",
]  # fmt: skip

# Each process takes its share of eight groups, completions of 1 to 90 tokens, updates twice, and says what came.
SCRIPT = """
import json, sys
from copy import deepcopy
import torch
from rl_helpers import frozen, make_trainer, perturb, settings, tiny_llama, tiny_scorer, plain_logps
from posttrain.errors import entry
from posttrain.rl.config import PPOConfig
from posttrain.rl.types import Completion, Rollouts

out, kind, extra = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
torch.manual_seed(0)
policy = tiny_llama(seed=3)
generator = torch.Generator().manual_seed(5)
draw = lambda n: torch.randint(5, 250, (n,), generator=generator).tolist()
prompts = [draw(3 + g) for g in range(8) for _ in range(2)]
prompts = [prompts[i - i % 2] for i in range(16)]
ids = [draw(n) for n in (1, 90, 7, 30, 2, 60, 55, 1, 5, 6, 70, 8, 9, 10, 11, 12)]
completions = [Completion(c, plain_logps(policy, p, c).tolist(), "length") for p, c in zip(prompts, ids)]
score = [("odd", lambda completion_ids, **_: [len(c) % 7 + sum(c) % 3 for c in completion_ids], 1.0)]
config = settings(num_prompts=8, num_generations=2, max_completion_length=90, max_tokens_per_microbatch=150,
                  beta=0.05, num_minibatches=1, max_mismatch=1e9, **extra)  # the second update is off policy
parts = {"reference": frozen(policy)}
if kind == "ppo":
    critic = tiny_scorer(seed=1)
    perturb(critic, 0.02)
    parts |= {"critic": critic, "ppo": PPOConfig(reward_model_path="none", critic="policy", whiten_rewards=True)}
perturb(parts["reference"].model, 0.02)
trainer = make_trainer(out, policy, score, config, **parts)
rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
mine = [g * 2 + k for g in range(8)[rank::world] for k in range(2)]
take = lambda values: [values[i] for i in mine]
rollouts = Rollouts([{"row": i, "prompt": "p"} for i in mine], take(prompts), take(completions), 2)
numbers = []
for step in range(2):
    experience = trainer.score(trainer.reward(rollouts))
    trainer.add_advantages(experience)
    numbers.append(trainer.update(experience))
    trainer.step += 1
models = [policy] + ([trainer.critic] if trainer.critic is not None else [])
sums = [p.double().sum().item() for m in models for p in m.parameters()]
with open(f"{out}.rank-{rank}", "w") as file:
    json.dump({"sums": sums, "numbers": numbers, "world": world}, file)
entry(lambda: 0)
"""


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("grpo", {"loss_type": "dapo"}),
        ("grpo", {"loss_type": "grpo", "scale_rewards": "batch"}),
        ("grpo", {"advantage": "reinforce_pp"}),
        ("ppo", {}),
    ],
    ids=["dapo", "batch scale", "reinforce++", "ppo"],
)
def test_two_processes_update_as_one(tmp_path, kind, extra):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    found = {}
    for world in (1, 2):
        flags = ["--multi_gpu"] if world > 1 else ["--cpu"]
        out = tmp_path / str(world)
        done = call(
            [*LAUNCH, *flags, "--num_processes", world, script, out, kind, json.dumps(extra)],
            ACCELERATE_USE_CPU="true",
        )
        assert done.returncode == 0, done.stderr
        found[world] = [json.loads((tmp_path / f"{world}.rank-{rank}").read_text()) for rank in range(world)]
    [one], two = found[1], found[2]
    assert one["world"] == 1 and two[0]["world"] == 2
    assert two[0]["sums"] == two[1]["sums"]
    # AdamW's step is about the learning rate wherever a gradient is not 0: sums of weights within 1e-2 of it agree.
    assert two[0]["sums"] == pytest.approx(one["sums"], abs=2e-3)
    for mine, other in zip(one["numbers"], two[0]["numbers"], strict=True):
        assert mine["grad_norm"] > 0 and mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        for key in ("loss", "entropy", "ratio", "clip_ratio", "mismatch"):
            assert mine[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key
