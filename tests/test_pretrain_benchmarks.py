"""The pretraining benchmark in its smallest size, so that it cannot rot: figures follow from what it counts, and the
check that both trainers' models are one function sees a wrong weight.

Run: pytest tests/test_pretrain_benchmarks.py
"""

import json
import statistics
import sys

import pytest
import torch
from recipe_runs import ROOT, call

SCRIPT = ROOT / "tests" / "benchmarks" / "pretrain_speed.py"
SIZE = [
    "--cases", "smallest-fp32", "--size", "smallest", "--kinds", "ours", "plain", "--rounds", 2,
    "--tokens", 1_000_000,
]  # fmt: skip


@pytest.mark.slow
def test_it_runs_and_its_figures_follow_from_what_it_counts(tmp_path):
    done = call([sys.executable, SCRIPT, *SIZE, "--out", tmp_path / "found"])
    assert done.returncode == 0, done.stderr[-3000:]
    found, text = json.loads((tmp_path / "found.json").read_text()), (tmp_path / "found.md").read_text()
    [step], two = found["step"], found["processes"]
    assert step["tokens a step"] == 4 * 32 and step["trainers"].keys() == {"ours", "plain"}
    for case, one, other in ((step, "ours", "plain"), (two, "two processes", "one process")):
        for clock in ("wall", "cpu"):
            ratios = [each[other][clock] / each[one][clock] for each in case["rounds"]]
            assert len(ratios) == 2 and min(ratios) > 0
            assert case["ratios"][f"{one} / {other}"][clock]["median"] == pytest.approx(statistics.median(ratios))
            speed = 2 * 4 * 32 / statistics.median(each[one][clock] for each in case["rounds"])
            assert case["tokens per second"][one][clock] == pytest.approx(speed)
    # An untrained model is as good as a guess among 512; both have begun to learn, and equally much.
    losses = {kind: end["held-out loss"] for kind, end in step["trainers"].items()}
    assert max(losses.values()) < torch.tensor(512.0).log() and losses["ours"] == pytest.approx(
        losses["plain"], abs=0.05
    )
    both = [end["held-out loss"] for end in two["trainers"].values()]
    assert both[0] == pytest.approx(both[1], abs=1e-4)  # two processes compute what one does
    assert 0 < step["trainers"]["ours"]["data seconds a step"] < step["rounds"][0]["ours"]["wall"]
    # 6 N D with N = 124 M, and 12 L d s / 2 for attention (Narayanan et al. 2021, 2104.04473, halved: causal)
    flops = 512 * 1024 * (6 * 123.5e6 + 6 * 12 * 768 * 1024)
    assert found["loader"]["H200 step"] == pytest.approx(flops / (790e12 * 0.4), rel=1e-3)
    assert found["loader"]["chunks"] == 1_000_000 // 1024 and 0 < found["loader"]["memory"] < 5
    assert "| smallest | fp32 | ours / plain |" in text and found["command"] in text and "| disk |" in text


@pytest.mark.slow
def test_mfu_is_what_the_tokens_need_over_what_the_device_can(monkeypatch):
    """On a CPU whose rate is given; the real models and rate need a GPU."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from pretrain_speed_gpu import mfu_part
    from pretrain_speed_tables import mfu

    from posttrain.shapes import ShapeConfig

    shape = ShapeConfig(32, 128, 1, 1, 16, model_type="gpt2", vocab_multiple=512)
    found = mfu_part({"a small one": shape}, {"plain": {"kind": "plain"}}, (16,), 16, rate=1e9)
    [run] = found["runs"]
    # 12 d^2 in the layer, its biases and norms (13 d), the last norm (2 d), the tied head (512 d); 6 L d s: attention
    needed = 6 * (12 * 32**2 + 13 * 32 + 2 * 32 + 512 * 32) + 6 * 32 * 16
    assert run["FLOPs a token"] == needed
    assert run["MFU of measured"] == pytest.approx(needed * run["tokens per second"] / 1e9)
    assert run["low"] <= run["tokens per second"] <= run["high"] and run["MFU of listed"] is None
    assert f"| a small one | 0 | plain | 16 | {run['tokens per second']:,.0f} [" in "\n".join(mfu(found, "wall"))


@pytest.fixture
def pair(monkeypatch):
    """(a transformers GPT-2, its plain copy, chunks)."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from pretrain_speed_plain import plain_copy
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, vocab_size=50, **off))
    return model, plain_copy(model), torch.randint(50, (3, 16))


def test_equal_models_pass_with_gradients_equal_but_for_rounding(pair):
    from pretrain_speed_setup import compare_models

    model, plain, chunks = pair
    assert sum(p.numel() for p in plain.parameters()) == model.num_parameters()
    assert compare_models(model, plain, chunks)["gradients"] < 1e-4


@pytest.mark.parametrize("name", ["tokens.weight", "blocks.1.qkv.weight", "blocks.0.down.bias", "norm.weight"])
def test_a_wrong_weight_is_seen(pair, name):
    from pretrain_speed_setup import compare_models

    model, plain, chunks = pair
    with torch.no_grad():
        plain.get_parameter(name).flatten()[7] += 0.05
    with pytest.raises(SystemExit, match="the models differ"):
        compare_models(model, plain, chunks)


def test_a_matrix_that_is_not_transposed_is_seen(pair):
    from pretrain_speed_setup import compare_models

    model, plain, chunks = pair
    with torch.no_grad():
        square = plain.blocks[0].out.weight
        square.copy_(square.t().clone())
    with pytest.raises(SystemExit, match="the models differ"):
        compare_models(model, plain, chunks)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would be measured")
def test_mfu_without_a_gpu_says_so_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    from pretrain_speed import main

    main(["mfu", "--out", str(tmp_path / "gpu")])
    assert "there is no GPU" in capsys.readouterr().out and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        main(["mufu"])
    assert "PART: found mufu, expected some of step, loader, processes, mfu" in capsys.readouterr().err
