"""Reward models: training, early stopping, adapters, resuming, and scores against transformers' own.

Run: pytest tests/test_reward_model.py
"""

import json
import math
import shutil

import pytest
import torch
from rl_helpers import assert_same_gradients, gradients_of, signals_restored, start_stage, tiny_scorer, tiny_tokenizer

from posttrain import stage
from posttrain.errors import UserError
from posttrain.layouts import LAYOUTS
from posttrain.lora import LoraArgs
from posttrain.models import ModelConfig, save_pair
from posttrain.ranking_forward import score_all
from posttrain.ranking_losses import LOSS_FUNCTIONS, RankingLoss
from posttrain.ranking_rows import Ranking
from posttrain.reward_model import RewardConfig, init_head, prepare, split_validation, train
from posttrain.rewards.model import RewardModelScore, load_reward_model
from posttrain.rl.config import PPOConfig
from posttrain.rl.models import load_critic
from posttrain.training import OptimConfig


def some_sequences() -> list[list[int]]:
    """1 to 120 tokens, end tokens inside and at the end of some, no pad."""
    generator = torch.Generator().manual_seed(0)
    end = tiny_tokenizer().eos_token_id
    sequences = [torch.randint(5, 250, (n,), generator=generator).tolist() for n in (7, 120, 1, 33, 60, 12, 33)]
    sequences[1][40] = sequences[1][41] = sequences[3][-1] = sequences[4][0] = sequences[4][-1] = end
    return sequences


@pytest.mark.parametrize("max_tokens", [1, 100, 8192])
def test_scores_are_those_of_transformers_on_a_right_padded_batch(tmp_path, max_tokens):
    from transformers import AutoModelForSequenceClassification

    tiny_scorer().save_pretrained(tmp_path / "model")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1)
    sequences, pad = some_sequences(), tiny_tokenizer().pad_token_id
    width = max(map(len, sequences))
    ids = torch.tensor([s + [pad] * (width - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(torch.tensor(score_all(model, sequences, max_tokens)), expected, atol=1e-5, rtol=1e-5)


def test_head_is_drawn_with_the_width_it_reads():
    model = tiny_scorer(hidden_size=2048, intermediate_size=8, head_dim=2, num_hidden_layers=1)
    init_head(model)
    weights = model.score.weight.detach()
    assert weights.std().item() == pytest.approx(1 / math.sqrt(2049), rel=0.06)
    assert abs(weights.mean().item()) < 4 / 2049


def run_training(folder, model, rankings, *, learning_rate=1e-2, validation=(), save_total_limit=9, **keys):
    config = RewardConfig(**keys)
    optim = OptimConfig(learning_rate=learning_rate, warmup_steps=0, max_grad_norm=1e9)
    with signals_restored():
        run = start_stage(folder, config, optim, name="reward", save_steps=2, save_total_limit=save_total_limit)
        done = train(run, stage.accelerator(bf16=False), model, rankings, config, optim, validation)
    return run, done


def rankings_by_length(sizes: list[list[int]], seed: int = 1) -> list[Ranking]:
    """Random replies to random prompts of 9 tokens; the shorter the better."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> list[int]:
        return torch.randint(5, 250, (n,), generator=generator).tolist()

    rankings = []
    for index, row in enumerate(sizes):
        prompt = draw(9)
        rankings.append(Ranking([prompt + draw(n) for n in sorted(row)], list(range(len(row))), index))
    return rankings


def weights_of(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss_type", LOSS_FUNCTIONS)
def test_gradient_is_the_mean_over_rankings_whatever_the_micro_batches(tmp_path, loss_type, layout):
    rankings = rankings_by_length([[1, 200], [30, 60, 90, 2], [5, 6, 7], [100, 101]])
    rankings[1].ranks, rankings[2].margins = [0, 1, 1, 2], [0.0, 0.3, 0.6]
    keys = {"loss_type": loss_type, "label_smoothing": 0.1, "center_rewards_coefficient": 0.01}
    model, loss = tiny_scorer(), RankingLoss(**keys)
    losses = []
    for ranking in rankings:  # one sequence a forward, by transformers itself
        scores = torch.cat([model(input_ids=torch.tensor([s])).logits[0] for s in ranking.sequences])
        losses.append(loss(scores, ranking.ranks, ranking.margins))
    torch.stack(losses).mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    for max_tokens in (1, 150, 8192):
        model = tiny_scorer()
        with gradients_of(model) as found:
            _, done = run_training(
                tmp_path / str(max_tokens), model, rankings, **keys, max_steps=1, batch_size=4,
                max_tokens_per_microbatch=max_tokens, layout=layout,
            )  # fmt: skip
        assert_same_gradients(found, expected, rtol=1e-3)
        assert done.tokens == sum(len(s) for r in rankings for s in r.sequences)


def test_training_learns_to_prefer_the_shorter_reply_and_resumes_bit_equal(tmp_path):
    rankings, ends = rankings_by_length([[4, 12, 20]] * 24), []
    for cut in (None, 4, 2):
        model, out = tiny_scorer(initializer_range=0.02), tmp_path / "out"
        if cut is not None:
            interrupted_at(out, cut)
        run, _ = run_training(out, model, rankings, learning_rate=3e-3, max_steps=6, batch_size=24)
        assert (run.resume_folder is None) if cut is None else run.resume_folder.name == f"step-0000000{cut}"
        ends.append(weights_of(model))
        assert [line["step"] for line in log_of(out)] == [1, 2, 3, 4, 5, 6]
    for end in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ends[0], end, strict=True))
    assert log_of(tmp_path / "out")[-1]["loss"] < 0.8 * math.log(6)  # ln 3! is what equal scores cost


def interrupted_at(out, step: int) -> None:
    """As if the run had died after the checkpoint at `step`."""
    for folder in (out / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


def test_training_stops_when_held_out_likelihood_no_longer_falls_and_keeps_the_best(tmp_path):
    """The order of the validation rankings is the opposite: the better it learns, the worse they get."""
    rankings = rankings_by_length([[4, 12, 20]] * 24)
    against = [Ranking(r.sequences[::-1], r.ranks, r.row) for r in rankings_by_length([[4, 12, 20]] * 12, seed=2)]
    keys = {"learning_rate": 3e-3, "max_steps": 40, "batch_size": 24, "eval_steps": 2, "early_stopping_patience": 3}
    ends = []
    for cut in (None, 4):
        model, out = tiny_scorer(initializer_range=0.02), tmp_path / "out"
        if cut is not None:
            interrupted_at(out, cut)
        run, done = run_training(out, model, rankings, validation=against, **keys)
        lines = log_of(out)
        evals = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
        best = min(evals, key=evals.get)
        assert done.best_step == best and done.step == best + 6 == lines[-1]["step"] < 40
        ends.append(weights_of(model))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    # the kept weights give the lowest validation loss, by transformers itself
    loss, found = RankingLoss(), []
    for ranking in against:
        with torch.no_grad():
            scores = torch.cat([model(input_ids=torch.tensor([s])).logits[0] for s in ranking.sequences])
        found.append(loss(scores, ranking.ranks).item())
    assert sum(found) / len(found) == pytest.approx(evals[best], abs=1e-5)
    assert evals[best] < max(evals.values()) - 0.01


def test_early_stopping_is_off_by_default_and_changes_nothing_until_it_stops(tmp_path):
    rankings, ends = rankings_by_length([[4, 12, 20]] * 24), []
    held = rankings_by_length([[4, 12, 20]] * 12, seed=2)
    for name, keys in {"off": {}, "on": {"eval_steps": 4, "early_stopping_patience": 9, "validation": held}}.items():
        model = tiny_scorer(initializer_range=0.02)
        _, done = run_training(tmp_path / name, model, rankings, max_steps=4, batch_size=24, **keys)
        assert done.best_step == (None if name == "off" else 4)
        assert any("eval_loss" in line for line in log_of(tmp_path / name)) == (name == "on")
        ends.append(weights_of(model))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_validation_keeps_whole_prompts_and_does_not_depend_on_their_order():
    rows = [{"prompt": [{"role": "user", "content": f"q{i % 40}"}]} for i in range(120)]
    rankings = [Ranking([[1], [2]], [0, 1], i) for i in range(120)]
    config = RewardConfig(eval_steps=5, validation_share=0.25)
    learn, held = split_validation(rankings, rows, config)
    assert len(learn) + len(held) == 120 and 3 * 4 <= len(held) <= 3 * 17  # 40 prompts: 10 +- 2.5 standard errors
    assert not {r.row % 40 for r in learn} & {r.row % 40 for r in held}
    assert {r.row for r in split_validation(rankings[::-1], rows, config)[1]} == {r.row for r in held}
    assert split_validation(rankings, rows, RewardConfig()) == (rankings, [])
    with pytest.raises(UserError, match="validation_share: 0.25 of 3 rankings leaves"):
        split_validation([r for r in rankings if r.row % 40 == learn[0].row % 40], rows, config)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"loss_type": "pairs"}, "loss_type: found 'pairs', expected one of plackett_luce, bradley_terry, top1"),
        ({"ties": "davidson"}, "ties: found 'davidson', expected one of average, breslow"),
        ({"layout": "flash"}, "layout: found 'flash', expected one of auto, prefix"),
        ({"label_smoothing": 0.5}, "label_smoothing: found 0.5"),
        ({"center_rewards_coefficient": -1.0}, "center_rewards_coefficient: found -1.0"),
        ({"validation_share": 1.0}, "validation_share: found 1.0"),
        ({"early_stopping_patience": 0}, "early_stopping_patience: found 0"),
    ],
)
def test_settings_out_of_range_are_refused(keys, words):
    with pytest.raises(UserError, match=words):
        RewardConfig(**keys)


def base_model(folder):
    """A causal LM on disk, as the stage before leaves it."""
    from rl_helpers import tiny_llama

    save_pair(tiny_llama(), tiny_tokenizer(), folder)
    return folder


def test_an_adapter_learns_resumes_and_scores_the_same_however_it_is_loaded(tmp_path):
    """Merged weights by plain transformers, the adapter by peft, and by transformers on the adapter's folder."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from posttrain.models import load_scalar_model

    base, rankings, ends = base_model(tmp_path / "base"), rankings_by_length([[4, 12, 20]] * 24), []
    keys = {"learning_rate": 1e-2, "max_steps": 6, "batch_size": 24}
    for cut in (None, 4):
        if cut is not None:
            interrupted_at(tmp_path / "out", cut)
        torch.manual_seed(0)
        model = load_scalar_model(ModelConfig(str(base)))
        before = weights_of(model.model.layers[0])
        wrapped = prepare(model, tiny_tokenizer(), LoraArgs(use_peft=True, lora_r=4, lora_alpha=8))
        run_training(tmp_path / "out", model, rankings, **keys)
        ends.append({name: p.detach().clone() for name, p in model.named_parameters()})
    assert all(torch.equal(p, ends[1][name]) for name, p in ends[0].items())
    frozen = {name: p for name, p in ends[0].items() if name.startswith("model.layers.0") and "lora_" not in name}
    assert len(frozen) == len(before) and all(torch.equal(a, b) for a, b in zip(frozen.values(), before, strict=True))
    assert log_of(tmp_path / "out")[-1]["loss"] < math.log(6)
    expected = score_all(model, some_sequences())
    save_pair(wrapped, tiny_tokenizer(), tmp_path / "saved")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert merged.config.num_labels == 1 and not any("lora" in name for name, _ in merged.named_parameters())
    torch.manual_seed(1)  # the head that peft replaces is drawn anew
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    apart = PeftModel.from_pretrained(plain, tmp_path / "saved" / "adapter")
    for name, loaded in {"merged": merged, "adapter": apart.get_base_model()}.items():
        assert score_all(loaded, some_sequences()) == pytest.approx(expected, abs=1e-4), name
    assert max(expected) - min(expected) > 0.01


def test_reward_function_normalises_and_clips():
    model = tiny_scorer()
    sequences = some_sequences()
    raw = torch.tensor(score_all(model, sequences))
    reward = RewardModelScore(model, mean=0.5, std=2.0, clip=0.1)
    found = reward(None, None, [s[-1:] for s in sequences], prompt_ids=[s[:-1] for s in sequences], answer=None)
    assert found == pytest.approx(((raw - 0.5) / 2).clamp(-0.1, 0.1).tolist(), abs=1e-5)
    assert max(map(abs, found)) == pytest.approx(0.1)


def test_reward_model_and_critic_are_loaded_from_a_stage(tmp_path):
    tiny_scorer().save_pretrained(tmp_path)
    base = ModelConfig(model_name_or_path="the policy's")
    ppo = PPOConfig(reward_model_path=str(tmp_path), reward_clip=100.0)
    with pytest.raises(UserError, match=r"reward_model_path: .* stage\.json"):
        load_reward_model(base, ppo, "cpu")
    metrics = {"score mean": {"value": 0.5}, "score std": {"value": 2.0}}
    (tmp_path / "stage.json").write_text(json.dumps({"status": "finished", "metrics": metrics}))
    reward, [sequence] = load_reward_model(base, ppo, "cpu"), some_sequences()[:1]
    assert not any(p.requires_grad for p in reward.model.parameters())
    [found] = reward(None, None, [sequence[3:]], prompt_ids=[sequence[:3]])
    assert found == pytest.approx((score_all(tiny_scorer(), [sequence])[0] - 0.5) / 2, abs=1e-5)
    assert score_all(load_critic(base, ppo, None, "cpu"), some_sequences()) == [0.0] * 7
