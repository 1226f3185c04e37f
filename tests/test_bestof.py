"""Best-of-n: the estimator against all draws counted out, KL against its integral, the verb on small real models.

Run: pytest tests/test_bestof.py
"""

import itertools
import json
import math

import pytest
import torch
from rl_helpers import signals_restored, tiny_llama, tiny_scorer, tiny_tokenizer

from posttrain.best_of_n import best_of_n_kl, curve, expected_best, fit_best_of_n, pick_weights, powers
from posttrain.cli import command
from posttrain.models import save_pair


@pytest.mark.parametrize("n", [1, 2, 5, 16, 1000])
def test_the_kl_is_the_integral_of_its_density(n):
    """The pick's quantile u has density n u^(n-1) against a uniform one: KL = integral of p ln p."""
    u = (torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 2_000_000
    density = n * u ** (n - 1)
    logs = math.log(n) + (n - 1) * u.log()
    assert best_of_n_kl(n) == pytest.approx((density * logs).mean().item(), abs=1e-4)
    assert n > 1 or best_of_n_kl(n) == 0


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_every_draw_counted_out(n):
    """N = 6: the pick's value averaged over all ways to draw n of them; equal scores are drawn for."""
    scores = torch.tensor([[0.3, 2.0, -1.0, 2.0, 0.3, 0.3], [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    values = torch.tensor([[1.0, 2.0, 3.0, 7.0, -4.0, 0.0], [1.0, 0.0, 0.0, 2.0, 5.0, 9.0]], dtype=torch.float64)
    for row in range(2):
        picks = []
        for drawn in itertools.combinations(range(6), n):
            best = max(scores[row, i] for i in drawn)
            top = [values[row, i].item() for i in drawn if scores[row, i] == best]
            picks.append(sum(top) / len(top))
        found = expected_best(scores, values, [n])[row, 0].item()
        assert found == pytest.approx(sum(picks) / len(picks))


def test_the_ends_are_the_mean_and_the_best():
    generator = torch.Generator().manual_seed(0)
    scores, values = torch.randn(4, 64, generator=generator), torch.randn(4, 64, generator=generator)
    found = expected_best(scores, values, [1, 64])
    torch.testing.assert_close(found[:, 0], values.double().mean(1))
    torch.testing.assert_close(found[:, 1], values.double().gather(1, scores.argmax(1, keepdim=True))[:, 0])
    assert pick_weights(1000, 400).sum().item() == pytest.approx(1)


def test_the_estimator_is_unbiased_and_the_curve_has_its_intervals():
    """Scores from N(0, 1): the best of 2 is 1/sqrt(pi) on average, of 3 it is 3/(2 sqrt(pi))."""
    scores = torch.randn(4000, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    points = curve(scores, {"score": scores}, [1, 2, 3])
    for point, expected in zip(points, (0.0, 1 / math.sqrt(math.pi), 1.5 / math.sqrt(math.pi)), strict=True):
        assert point["score"]["low"] < expected < point["score"]["high"]
        assert point["score"]["high"] - point["score"]["low"] < 0.04
    assert [p["kl"] for p in points] == pytest.approx([0, math.log(2) - 1 / 2, math.log(3) - 2 / 3])
    assert powers(16) == [1, 2, 4, 8, 16] and powers(12) == [1, 2, 4, 8, 12] and powers(2) == [1, 2]


def test_a_known_curve_is_fitted():
    ns = [1, 2, 4, 8, 16, 64]
    d = torch.tensor([math.sqrt(best_of_n_kl(n)) for n in ns], dtype=torch.float64)
    noise = torch.randn(300, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    picks = 1.7 + d * (0.9 - 0.35 * d) + 0.1 * noise
    fit = fit_best_of_n(picks, ns)
    for found, true in ((fit.alpha, 0.9), (fit.beta, 0.35)):
        assert found["low"] < true < found["high"] and found["high"] - found["low"] < 0.15
    assert fit.peak == pytest.approx(0.9 / 0.7, rel=0.1)
    assert fit.at(1.0) == pytest.approx(fit.alpha["value"] - fit.beta["value"]) and fit.rms < 0.02
    exact = fit_best_of_n((d * (0.9 - 0.35 * d)).repeat(3, 1), ns)
    assert (exact.alpha["value"], exact.beta["value"]) == pytest.approx((0.9, 0.35)) and exact.rms < 1e-9
    assert fit_best_of_n((d * 0.5).repeat(3, 1), ns).beta["value"] == pytest.approx(0)
    with pytest.raises(ValueError, match="expected 1 and at least two more"):
        fit_best_of_n(picks[:, :2], [1, 2])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A chat model and a reward model of one tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    save_pair(tiny_llama(), tiny_tokenizer(), folder / "chat")
    save_pair(tiny_scorer(), tiny_tokenizer(), folder / "reward")
    return folder


def bestof(models, *flags: str) -> int:
    fixed = ["--model", str(models / "chat"), "--reward", str(models / "reward"), "--use_vllm", "false"]
    with signals_restored():
        return command(["bestof", *fixed, *flags])


def test_the_verb_writes_table_picture_and_figures(models, tmp_path, capsys):
    flags = ("--n", "6", "--data", "tiny", "--data_config", "prompts", "--rows", "5", "--max_tokens", "6")
    assert bestof(models, *flags, "--out", str(tmp_path / "a")) == 0
    found = json.loads((tmp_path / "a" / "bestof.json").read_text())
    assert [p["n"] for p in found["curve"]] == [1, 2, 4, 6] and found["prompts"] == 5
    proxy = [p["reward model"]["value"] for p in found["curve"]]
    assert proxy == sorted(proxy) and proxy[0] < proxy[-1]
    assert all("tiny_utility" in p for p in found["curve"])
    table = (tmp_path / "a" / "bestof.md").read_text()
    assert table in capsys.readouterr().out and table.count("\n") == 6
    assert (tmp_path / "a" / "bestof.svg").read_text().startswith("<svg xmlns=")
    assert bestof(models, *flags, "--out", str(tmp_path / "b")) == 0  # the same samples for the same seed
    assert json.loads((tmp_path / "b" / "bestof.json").read_text())["curve"] == found["curve"]
    assert bestof(models, *flags, "--out", str(tmp_path / "c"), "--seed", "1", "--judge") == 0
    other = json.loads((tmp_path / "c" / "bestof.json").read_text())["curve"]
    assert "tiny_utility" not in other[0] and other[0]["reward model"] != found["curve"][0]["reward model"]


def test_the_manifest_of_the_reward_model_gives_the_scores_their_unit(models, tmp_path):
    import shutil

    shutil.copytree(models, tmp_path / "models")
    metrics = {"score mean": {"value": 2.0}, "score std": {"value": 4.0}}
    manifest = {"stage": "reward", "status": "finished", "metrics": metrics}
    (tmp_path / "models" / "reward" / "stage.json").write_text(json.dumps(manifest))
    flags = ("--n", "4", "--data", "tiny", "--data_config", "prompts", "--rows", "3", "--max_tokens", "4")
    for folder, out in ((models, "raw"), (tmp_path / "models", "unit")):
        assert bestof(folder, *flags, "--out", str(tmp_path / out)) == 0
    raw, unit = (json.loads((tmp_path / out / "bestof.json").read_text())["curve"] for out in ("raw", "unit"))
    for a, b in zip(raw, unit, strict=True):
        assert b["reward model"]["value"] == pytest.approx((a["reward model"]["value"] - 2) / 4)
        assert a["tiny_utility"] == b["tiny_utility"]


def test_what_cannot_be_studied_is_refused(models, tmp_path):
    from posttrain.errors import UserError

    flags = ("--data", "tiny", "--data_config", "prompts", "--out", str(tmp_path))
    with pytest.raises(UserError, match="--n: found 1, expected at least 2"):
        bestof(models, *flags, "--n", "1")
    with pytest.raises(UserError, match="policy: no folder"):
        command(["bestof", "--model", "/nowhere", "--reward", str(models / "reward"), *flags])
