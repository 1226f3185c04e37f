"""Reward models: ranking losses against closed forms, scores against transformers' own, metrics by hand."""

import itertools
import json
import math

import pytest
import torch
from rl_helpers import assert_same_gradients, gradients_of, signals_restored, start_stage, tiny_scorer, tiny_tokenizer

from posttrain import stage
from posttrain.errors import UserError
from posttrain.models import ModelConfig
from posttrain.ranking_metrics import kendall_tau, measure_rankings, pair_accuracy
from posttrain.reward_model import (
    LOSS_FUNCTIONS,
    Ranking,
    RewardConfig,
    bradley_terry_loss,
    encode_rankings,
    init_head,
    plackett_luce_loss,
    score_all,
    train,
)
from posttrain.rewards.model import RewardModelScore, load_critic, load_reward_model
from posttrain.rl.config import PPOConfig
from posttrain.training import OptimConfig


@pytest.mark.parametrize("loss", LOSS_FUNCTIONS.values(), ids=LOSS_FUNCTIONS)
@pytest.mark.parametrize("gap", [-30.0, -1.5, 0.0, 0.7, 30.0])
def test_two_replies_are_the_bradley_terry_loss(loss, gap):
    found = loss(torch.tensor([0.4 + gap, 0.4], dtype=torch.float64), [0, 1]).item()
    assert found == pytest.approx(math.log1p(math.exp(-gap)))
    assert gap != 0 or found == pytest.approx(math.log(2))


@pytest.mark.parametrize("k", [2, 3, 5, 8])
def test_equal_scores_cost_the_log_of_the_number_of_orders(k):
    assert plackett_luce_loss(torch.full((k,), 2.5), list(range(k))).item() == pytest.approx(
        math.log(math.factorial(k))
    )
    assert bradley_terry_loss(torch.full((k,), 2.5), list(range(k))).item() == pytest.approx(math.log(2))


def test_plackett_luce_by_hand():
    # weights 3, 2, 1: the order has probability 3/6 * 2/3 * 1
    scores = torch.tensor([3.0, 2.0, 1.0]).log()
    assert plackett_luce_loss(scores, [0, 1, 2]).item() == pytest.approx(-math.log(1 / 3), abs=1e-6)


def test_the_probabilities_of_all_orders_sum_to_one():
    scores = torch.tensor([0.3, -1.2, 2.0, 0.9])
    orders = [list(order) for order in itertools.permutations(range(4))]
    assert sum(math.exp(-plackett_luce_loss(scores[o], [0, 1, 2, 3]).item()) for o in orders) == pytest.approx(1.0)


@pytest.mark.parametrize("loss", LOSS_FUNCTIONS.values(), ids=LOSS_FUNCTIONS)
@pytest.mark.parametrize("ranks", [[0, 1, 2, 3], [0, 0, 1, 2], [0, 1, 1, 1], [0, 0, 2, 2]])
def test_only_differences_of_scores_count(loss, ranks):
    scores = torch.tensor([0.3, -1.2, 2.0, 0.9])
    assert loss(scores + 17, ranks).item() == pytest.approx(loss(scores, ranks).item(), abs=1e-5)


@pytest.mark.parametrize("loss", LOSS_FUNCTIONS.values(), ids=LOSS_FUNCTIONS)
def test_the_order_of_tied_replies_does_not_matter(loss):
    scores, ranks = [0.3, -1.2, 2.0, 0.9, -0.4], [0, 1, 1, 1, 2]
    losses = [
        loss(torch.tensor([scores[0], *middle, scores[4]]), ranks).item()
        for middle in itertools.permutations(scores[1:4])
    ]
    assert losses == pytest.approx([losses[0]] * 6)


def test_ties_by_hand():
    # Breslow: both firsts against all three, the last alone; pairs: each first against the last
    a, b, c = 0.5, -0.3, 1.1
    everyone = math.log(sum(map(math.exp, (a, b, c))))
    found = plackett_luce_loss(torch.tensor([a, b, c]), [0, 0, 1]).item()
    assert found == pytest.approx(2 * everyone - a - b, abs=1e-6)
    pairs = (math.log1p(math.exp(c - a)) + math.log1p(math.exp(c - b))) / 2
    assert bradley_terry_loss(torch.tensor([a, b, c]), [0, 0, 1]).item() == pytest.approx(pairs, abs=1e-6)


def test_a_ranking_of_ties_alone_has_no_pairs_to_learn_from():
    scores = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = bradley_terry_loss(scores, [0, 0])
    loss.backward()
    assert loss.item() == 0 and scores.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("loss", LOSS_FUNCTIONS.values(), ids=LOSS_FUNCTIONS)
@pytest.mark.parametrize("ranks", [[0, 1, 2, 3, 4], [0, 0, 1, 1, 2], [0, 1, 1, 1, 1]])
def test_gradient_equals_finite_differences(loss, ranks):
    scores = torch.tensor([0.3, -1.2, 2.0, 0.9, -0.1], dtype=torch.float64, requires_grad=True)
    loss(scores, ranks).backward()
    for k in range(5):
        step = torch.zeros(5, dtype=torch.float64)
        step[k] = 1e-6
        with torch.no_grad():
            slope = (loss(scores + step, ranks) - loss(scores - step, ranks)) / 2e-6
        assert scores.grad[k].item() == pytest.approx(slope.item(), abs=1e-7)


@pytest.mark.parametrize("loss", LOSS_FUNCTIONS.values(), ids=LOSS_FUNCTIONS)
def test_known_utilities_are_recovered_from_sampled_rankings(loss):
    """20000 orders of five replies, drawn by adding Gumbel noise to their utilities (Plackett-Luce)."""
    true = torch.tensor([1.0, 0.4, 0.0, -0.5, -0.9])
    generator = torch.Generator().manual_seed(0)
    noise = -torch.log(-torch.log(torch.rand(20_000, 5, generator=generator)))
    orders, counts = (true + noise).argsort(1, descending=True).unique(dim=0, return_counts=True)
    scores = torch.zeros(5, requires_grad=True)
    optimizer = torch.optim.LBFGS([scores], max_iter=30)

    def closure():
        optimizer.zero_grad()
        losses = torch.stack([loss(scores[order], [0, 1, 2, 3, 4]) for order in orders])
        mean = (losses * counts).sum() / counts.sum()
        mean.backward()
        return mean

    optimizer.step(closure)
    found = scores.detach() - scores.detach().mean()
    torch.testing.assert_close(found, true - true.mean(), atol=0.05, rtol=0)


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


def test_a_score_does_not_depend_on_its_batch_mates():
    model = tiny_scorer().train()
    together = score_all(model, some_sequences())
    alone = [score_all(model, [s])[0] for s in some_sequences()]
    assert together == pytest.approx(alone, abs=1e-5)
    assert score_all(model, some_sequences()[::-1]) == pytest.approx(together[::-1], abs=1e-5)
    assert model.training


def test_dropout_is_off_while_scoring_and_back_on_after():
    model = tiny_scorer(attention_dropout=0.5).train()
    assert score_all(model, some_sequences()) == score_all(model, some_sequences())
    assert model.training


def test_head_is_drawn_with_the_width_it_reads():
    model = tiny_scorer(hidden_size=2048, intermediate_size=8, head_dim=2, num_hidden_layers=1)
    init_head(model)
    weights = model.score.weight.detach()
    assert weights.std().item() == pytest.approx(1 / math.sqrt(2049), rel=0.06)
    assert abs(weights.mean().item()) < 4 / 2049


def say(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def ranking_rows() -> list[dict]:
    prompt = [{"role": "user", "content": "q"}]
    return [
        {"prompt": prompt, "completions": [say("best"), say("good"), say("so-so")], "ranks": [0, 1, 1]},
        {"prompt": prompt, "chosen": say("yes"), "rejected": say("a no that is much too long")},
        {"prompt": prompt, "completions": [say("x"), say("y")]},
    ]


def test_rankings_are_encoded_with_their_prompt_to_the_end_token():
    tokenizer = tiny_tokenizer()
    rankings, too_long = encode_rankings(tokenizer, ranking_rows(), 1000)
    assert too_long == 0
    assert [r.ranks for r in rankings] == [[0, 1, 1], [0, 1], [0, 1]]
    text = "<|im_start|>user<|im_sep|>q<|im_end|><|im_start|>assistant<|im_sep|>yes<|im_end|>"
    assert rankings[1].sequences[0] == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_too_long_rankings_are_left_out_and_counted():
    rankings, too_long = encode_rankings(tiny_tokenizer(), ranking_rows(), 30)
    assert ([r.row for r in rankings], too_long) == ([0, 2], 1)
    with pytest.raises(UserError, match="all 3 rankings.*max_length 5"):
        encode_rankings(tiny_tokenizer(), ranking_rows(), 5)


@pytest.mark.parametrize(
    "changes",
    [{"completions": [say("alone")]}, {"completions": []}, {"ranks": [0, 1]}, {"ranks": [1, 0, 2]}],
    ids=["one", "none", "fewer ranks", "unsorted"],
)
def test_a_malformed_ranking_is_named(changes):
    rows = ranking_rows()
    rows[0] = {**rows[0], **changes}
    with pytest.raises(UserError, match="row 0: "):
        encode_rankings(tiny_tokenizer(), rows, 1000)


def run_training(folder, model, rankings, *, learning_rate=1e-2, **keys):
    config = RewardConfig(**keys)
    optim = OptimConfig(learning_rate=learning_rate, warmup_steps=0, max_grad_norm=1e9)
    with signals_restored():
        run = start_stage(folder, config, optim, name="reward", save_steps=2)
        tokens = train(run, stage.accelerator(bf16=False), model, rankings, config, optim)
    return run, tokens


def rankings_by_length(sizes: list[list[int]]) -> list[Ranking]:
    """Random sequences; the shorter the better."""
    generator = torch.Generator().manual_seed(1)
    return [
        Ranking(
            [torch.randint(5, 250, (n,), generator=generator).tolist() for n in sorted(row)], list(range(len(row))), i
        )
        for i, row in enumerate(sizes)
    ]


@pytest.mark.parametrize("loss_type", LOSS_FUNCTIONS)
def test_gradient_is_the_mean_over_rankings_whatever_the_micro_batches(tmp_path, loss_type):
    rankings = rankings_by_length([[1, 200], [30, 60, 90, 2], [5, 6, 7], [100, 101]])
    model = tiny_scorer()
    losses = []
    for ranking in rankings:  # one sequence a forward, by transformers itself
        scores = torch.cat([model(input_ids=torch.tensor([s])).logits[0] for s in ranking.sequences])
        losses.append(LOSS_FUNCTIONS[loss_type](scores, ranking.ranks))
    torch.stack(losses).mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    for max_tokens in (1, 150, 8192):
        model = tiny_scorer()
        with gradients_of(model) as found:
            _, tokens = run_training(
                tmp_path / str(max_tokens), model, rankings, loss_type=loss_type, max_steps=1, batch_size=4,
                max_tokens_per_microbatch=max_tokens,
            )  # fmt: skip
        assert_same_gradients(found, expected, rtol=1e-3)
        assert tokens == sum(len(s) for r in rankings for s in r.sequences)


def test_training_learns_to_prefer_the_shorter_reply_and_resumes_bit_equal(tmp_path):
    rankings, ends = rankings_by_length([[4, 12, 20]] * 24), []
    for start in (0, 4):
        model = tiny_scorer(initializer_range=0.02)
        run, _ = run_training(tmp_path / "out", model, rankings, learning_rate=3e-3, max_steps=6, batch_size=24)
        assert (run.resume_folder is None) == (start == 0)
        ends.append([p.detach().clone() for p in model.parameters()])
        lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert lines[-1]["loss"] < 0.8 * math.log(6)  # ln 3! is what equal scores cost


def test_reward_function_normalises_and_clips(tmp_path):
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
    assert score_all(load_critic(base, ppo, "cpu"), some_sequences()) == [0.0] * 7


def test_pair_accuracy_and_tau_by_hand():
    # pairs 0-1 right, 0-2 right, 1-2 a tie of scores; the second ranking's tied pair does not count
    scores, ranks = [[3.0, 1.0, 1.0], [1.0, 2.0, 0.0]], [[0, 1, 2], [0, 0, 1]]
    assert pair_accuracy(scores, ranks)["value"] == pytest.approx((2.5 + 2) / 5)
    assert kendall_tau(*[x[0] for x in (scores, ranks)]) == pytest.approx(2 / 3)
    assert kendall_tau([1.0, 2.0, 3.0], [0, 1, 2]) == -1
    assert kendall_tau([3.0, 2.0, 1.0], [0, 1, 2]) == 1


def test_kendall_tau_counts_inversions():
    """Without ties: 1 - 4 inversions / (n (n - 1)), here for every order of four."""
    for order in itertools.permutations(range(4)):
        inversions = sum(order[i] < order[j] for i, j in itertools.combinations(range(4), 2))
        assert kendall_tau([float(x) for x in order], [0, 1, 2, 3]) == pytest.approx(1 - inversions / 3)


def test_metrics_of_a_scorer_that_knows_nothing():
    """Equal scores are worth a guess in every figure, not a full mark for the first place."""
    metrics = measure_rankings(
        [[1.0, 1.0, 1.0, 1.0]] * 3 + [[1.0, 2.0, 0.0, 0.0]], [[0, 1, 2, 3]] * 3 + [[0, 0, 1, 2]]
    )
    assert metrics["top-1"]["value"] == pytest.approx((3 * 0.25 + 1) / 4)
    flat = measure_rankings([[1.0, 1.0, 1.0, 1.0], [0.0] * 4], [[0, 1, 2, 3]] * 2)
    assert flat["pair accuracy"]["value"] == 0.5
    assert flat["kendall tau"]["value"] == 0
    assert flat["loss per ranking"]["value"] == pytest.approx(math.log(24))
    assert flat["score mean"]["value"] == 0.5
