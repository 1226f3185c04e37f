"""A saved reward model under a real vLLM engine. Run: pytest tests/test_reward_serving.py"""

import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from rl_helpers import tiny_llama, tiny_tokenizer

from posttrain.lora import LoraArgs
from posttrain.models import ModelConfig, load_scalar_model, save_pair
from posttrain.ranking_forward import score_all
from posttrain.reward_model import prepare

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_gives_the_scores_of_the_trainer(tmp_path):
    """With adapters merged, a head of its own, end tokens inside and at the end."""
    save_pair(tiny_llama(), tiny_tokenizer(), tmp_path / "base")
    torch.manual_seed(0)
    model = load_scalar_model(ModelConfig(str(tmp_path / "base"))).eval()
    wrapped = prepare(model, tiny_tokenizer(), LoraArgs(use_peft=True, lora_r=4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape)
    save_pair(wrapped, tiny_tokenizer(), tmp_path / "reward")
    end = tiny_tokenizer().eos_token_id
    sequences = [[9], [7, 8, end], torch.randint(5, 250, (120,)).tolist(), [50, end, 60, 70, end]]
    (tmp_path / "sequences.json").write_text(json.dumps(sequences))
    probe = Path(__file__).with_name("vllm_reward_probe.py")
    command = [sys.executable, probe, tmp_path / "reward", tmp_path / "sequences.json", tmp_path / "found.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found, expected = json.loads((tmp_path / "found.json").read_text()), score_all(model, sequences)
    assert [score for [score] in found["scores"]] == pytest.approx(expected, abs=1e-3)
    # Asked without use_activation=False it squashes the score, which keeps the order but not the differences.
    squashed = [1 / (1 + math.exp(-score)) for score in expected]
    assert [p for [p] in found["probabilities"]] == pytest.approx(squashed, abs=1e-3)
    assert max(expected) - min(expected) > 0.5
