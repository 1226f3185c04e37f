"""Scores with the prompt run once against transformers' plain padded forward: paddings, pads, end tokens, backbones.

Run: pytest tests/test_ranking_forward.py
"""

import pytest
import torch
from rl_helpers import tiny_scorer, tiny_tokenizer

from posttrain.errors import UserError
from posttrain.layouts import LAYOUTS, Layout, attention_cost, find_layout, shared_length
from posttrain.ranking_forward import SequenceScores, score_all, score_groups, score_rankings
from posttrain.ranking_rows import Ranking
from posttrain.reward_model import RewardConfig, choose_layout

EVERY = pytest.mark.parametrize("name", LAYOUTS)


def draw(*sizes: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 250, (n,), generator=generator).tolist() for n in sizes]


def rankings() -> list[list[list[int]]]:
    """K = 2 ... 9 behind prompts of 3 ... 90 tokens, with end tokens inside prompts and replies and at their ends,
    one reply that begins as another does, one that is the start of another, and two that are equal."""
    end = tiny_tokenizer().eos_token_id
    groups = []
    for index, (prompt, k) in enumerate([(40, 3), (3, 9), (90, 2), (12, 5)]):
        [first] = draw(prompt, seed=index)
        first[1] = first[-1] = end
        groups.append([first + reply + [end] for reply in draw(*range(1, 20 * k, 20), seed=10 + index)])
    groups[0][1][60 if len(groups[0][1]) > 60 else -3] = end
    groups[1][2] = groups[1][3][:-4]
    groups[3][4] = list(groups[3][3])
    return groups


def flat(groups: list[list]) -> list:
    return [each for group in groups for each in group]


@pytest.fixture(scope="module")
def scorer():
    return tiny_scorer()


def plain(model, sequences: list[list[int]], side: str, pad: int) -> torch.Tensor:
    """transformers' forward of one padded batch, the score taken at the last token that the mask shows."""
    width = max(map(len, sequences))
    rows, masks = [], []
    for s in sequences:
        gap = width - len(s)
        rows.append([pad] * gap + s if side == "left" else s + [pad] * gap)
        masks.append([0] * gap + [1] * len(s) if side == "left" else [1] * len(s) + [0] * gap)
    mask = torch.tensor(masks)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor(rows), attention_mask=mask, position_ids=positions)[0]
        last = [width - 1 if side == "left" else len(s) - 1 for s in sequences]
        return model.score(hidden[torch.arange(len(sequences)), last])[:, 0]


@EVERY
@pytest.mark.parametrize("pad", ["own pad", "pad == eos"])
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_scores_are_those_of_the_plain_padded_forward(scorer, name, side, pad):
    tokenizer = tiny_tokenizer()
    token, groups = tokenizer.eos_token_id if pad == "pad == eos" else tokenizer.pad_token_id, rankings()
    if side == "none":
        expected = torch.cat([plain(scorer, [s], "left", token) for s in flat(groups)])
    else:
        expected = plain(scorer, flat(groups), side, token)
    found = torch.tensor(flat(score_groups(scorer, groups, Layout(name))))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("cost", [0.0, 1e-3, 1.0], ids=["whole rankings", "cut", "cut to the narrowest"])
@pytest.mark.parametrize("max_tokens", [1, 200, 8192])
def test_neither_cuts_nor_batch_mates_change_a_score(scorer, cost, max_tokens):
    expected = flat(score_groups(scorer, rankings(), Layout("padded")))
    found = flat(score_groups(scorer, rankings(), Layout("prefix", cost), max_tokens))
    assert found == pytest.approx(expected, abs=2e-5)


def test_the_prompt_is_run_once():
    [group], [lone] = [rankings()[0]], draw(7)
    batch = Layout("prefix").batch([group, [lone]])
    common = shared_length(group)
    assert common >= 40
    used = (batch.input_ids != 0).sum().item()
    assert (
        used == common + sum(len(s) - common for s in group) + 7 == Layout("prefix").tokens(Ranking(group, [], 0)) + 7
    )
    assert batch.input_ids.flatten()[batch.last].tolist() == [s[-1] for s in (*group, lone)]
    wide = Layout("prefix", 1.0).batch([rankings()[1]])  # where attention is dear, prefixes repeat and rows are narrow
    assert wide.input_ids.shape[1] < Layout("prefix").batch([rankings()[1]]).input_ids.shape[1]


@pytest.mark.parametrize("name", ["prefix", "packed"])
def test_short_and_long_rankings_go_apart_where_attention_is_dear(scorer, name):
    """Three of 20 tokens and one of 400: together every row would be 400 wide."""
    rows = [Ranking([a, b], [0, 1], i) for i, (a, b) in enumerate(draw(n, n, seed=n) for n in (400, 20, 21, 22))]
    cheap, dear = Layout(name, 1e-5), Layout(name, 1e-2)
    assert cheap.micro_batches(rows, 8192) == [[1, 2, 3, 0]]
    assert dear.micro_batches(rows, 8192) == [[1, 2, 3], [0]]
    assert Layout(name, 1e-2, forward_cost=1e9).micro_batches(rows, 8192) == [[1, 2, 3, 0]]
    assert sorted(sum(dear.micro_batches(rows * 10, 500), [])) == list(range(40))
    expected = score_rankings(scorer, rows, Layout("padded"))
    assert flat(score_rankings(scorer, rows, dear)) == pytest.approx(flat(expected), abs=2e-5)


def test_a_changed_reply_leaves_its_neighbours_scores_bit_equal(scorer):
    groups = rankings()
    before = score_groups(scorer, groups, Layout("prefix"))
    groups[2][0][-2] = 7
    after = score_groups(scorer, groups, Layout("prefix"))
    assert before[2][0] != after[2][0] and before[2][1] == after[2][1]
    assert [before[i] for i in (0, 1, 3)] == [after[i] for i in (0, 1, 3)]


@EVERY
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_gradients_are_those_of_the_plain_forward(name, backend):
    groups = rankings()[::3]
    weights = torch.linspace(-1, 1, len(flat(groups)))
    gradients = []
    for kind in (name, None):
        model = tiny_scorer(attn_implementation=backend)
        if kind is None:
            scores = torch.cat([model(input_ids=torch.tensor([s])).logits[:, 0] for s in flat(groups)])
        else:
            scores = SequenceScores(model)(Layout(kind).batch(groups))
        (scores * weights).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for parameter, expected in gradients[1].items():
        scale = expected.abs().max().item()
        assert (gradients[0][parameter] - expected).abs().max().item() <= 1e-3 * scale + 1e-7, parameter


def config_of(kind: str, window: int = 16):
    """Two layers, 32 wide, of other families; weights drawn wide so that a wrong mask shows."""
    import transformers as t

    shape = {"vocab_size": 261, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 1}
    shape |= {"pad_token_id": 0, "initializer_range": 0.2}
    llama = shape | {"intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16}
    configs = {
        "gpt2": lambda: t.GPT2Config(
            vocab_size=261, n_embd=32, n_layer=2, n_head=2, num_labels=1, pad_token_id=0, initializer_range=0.2
        ),
        "qwen2": lambda: t.Qwen2Config(**{k: v for k, v in llama.items() if k != "head_dim"}),
        "qwen3": lambda: t.Qwen3Config(**llama),
        "gemma": lambda: t.GemmaConfig(**llama),
        "mistral": lambda: t.MistralConfig(**llama, sliding_window=window),
        "neox": lambda: t.GPTNeoXConfig(**shape, intermediate_size=48),
        "bloom": lambda: t.BloomConfig(
            vocab_size=261, hidden_size=32, n_layer=2, n_head=2, num_labels=1, pad_token_id=0, initializer_range=0.2
        ),
    }
    return configs[kind]()


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("gpt2", "prefix"), ("qwen2", "prefix"), ("qwen3", "prefix"), ("gemma", "prefix"), ("neox", "prefix"),
        ("mistral", "packed"), ("bloom", "padded"),
    ],
)  # fmt: skip
def test_any_backbone_gets_a_layout_that_gives_its_own_scores(kind, layout):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config_of(kind)).eval()
    found, why = find_layout(model, 100)
    assert found.name == layout and bool(why) == (layout != "prefix")
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([s])).logits[0, 0].item() for s in flat(rankings())]
    assert flat(score_groups(model, rankings(), found)) == pytest.approx(expected, abs=1e-4)


def test_a_window_is_no_obstacle_where_everything_fits_in_it():
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_config(config_of("mistral", window=64)).eval()
    assert find_layout(model, 64)[0].name == "prefix"
    assert find_layout(model, 65)[0].name == "packed"


class Notes(list):
    note = list.append


def test_a_layout_that_the_model_cannot_take_is_refused_and_a_fall_back_is_told():
    from transformers import AutoModelForSequenceClassification

    model, notes = AutoModelForSequenceClassification.from_config(config_of("bloom")), Notes()
    ranking = Ranking(draw(4, 5), [0, 1], 0)
    with pytest.raises(UserError, match="layout: prefix, but Bloom.*--layout auto"):
        choose_layout(notes, model, [ranking], RewardConfig(layout="prefix"))
    assert choose_layout(notes, model, [ranking], RewardConfig()).name == "padded"
    assert len(notes) == 1 and "padded" in notes[0] and "position ids" in notes[0]
    assert model.training


def test_the_probe_finds_a_model_that_ignores_positions(scorer, monkeypatch):
    """Positions that do not restart: what ALiBi by index or a position table of its own would do."""
    backbone = tiny_scorer()
    forward = backbone.model.forward

    def deaf(input_ids, position_ids=None, attention_mask=None, use_cache=False):
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    monkeypatch.setattr(backbone.model, "forward", deaf)
    layout, why = find_layout(backbone, 50)
    assert layout.name == "padded" and "prefix rows differ from padded ones" in why
    assert find_layout(scorer, 50) == (Layout("prefix", attention_cost(scorer)), "")


def test_dropout_is_off_while_scoring_and_back_on_after():
    model = tiny_scorer(attention_dropout=0.5).train()
    [group, *_] = rankings()
    assert score_groups(model, [group], Layout("prefix")) == score_groups(model, [group], Layout("prefix"))
    assert score_all(model, group) == score_all(model, group)
    assert model.training


def test_every_way_to_score_keeps_the_order(scorer):
    groups = rankings()
    rows = [Ranking(group, list(range(len(group))), i) for i, group in enumerate(groups)]
    assert score_rankings(scorer, rows) == score_groups(scorer, groups, Layout("packed"))
    assert score_all(scorer, flat(groups)) == pytest.approx(flat(score_rankings(scorer, rows)), abs=2e-5)
    assert score_all(scorer, flat(groups)[::-1]) == pytest.approx(score_all(scorer, flat(groups))[::-1], abs=2e-5)


def test_scores_of_a_bf16_model_agree_as_far_as_bf16_does():
    model = tiny_scorer().to(torch.bfloat16)
    expected = flat(score_groups(model, rankings(), Layout("padded")))
    scale = max(map(abs, expected))
    assert find_layout(model, 200)[0].name == "prefix"
    assert flat(score_groups(model, rankings(), Layout("prefix"))) == pytest.approx(expected, abs=0.05 * (1 + scale))
