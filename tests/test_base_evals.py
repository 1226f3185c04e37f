"""Figures of base models: windows and bits per byte, answers after examples, the tiny world's facts, the verb.

Run: pytest tests/test_base_evals.py
"""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import new_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import tiny_evals
from posttrain.base_evals import bits_per_byte, few_shot_answers, rolling_windows
from posttrain.cli import command
from posttrain.data import tiny
from posttrain.data.tiny_world import ATTRIBUTES, fact_sentence, make_world
from posttrain.errors import UserError
from posttrain.models import ModelConfig, load_scalar_model, save_pair
from posttrain.rl.hf_engine import HFEngine

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def base(tmp_path_factory, base_tokenizer):
    folder = tmp_path_factory.mktemp("evals") / "base"
    save_pair(new_llama(base_tokenizer), base_tokenizer, folder)
    return str(folder)


def measured(base, file, *flags) -> dict:
    command(["eval", base, *map(str, flags), "--use_vllm", "false", "--json", str(file)])
    return json.loads(file.read_text())


# --- bits per byte


@settings(deadline=None)  # the first call imports the harness
@given(st.integers(0, 40), st.integers(1, 12))
def test_windows_are_the_harness_s(count, size):
    utils = pytest.importorskip("lm_eval.utils")
    ids = list(range(100, 100 + count))
    theirs = map(utils.make_disjoint_window, utils.get_rolling_token_windows(ids, 7, size, 1))
    windows = rolling_windows(ids, 7, size)
    assert windows == list(theirs)
    assert [token for _, part in windows for token in part] == ids  # each once


def test_bits_per_byte_are_transformers_loss(base_tokenizer):
    """A text of one window: the loss of transformers, summed, in bits, over its bytes."""
    model, texts = new_llama(base_tokenizer), ["One day Tom found a kite. Ünï", "", "A drum!"]
    bits = 0.0
    for text in filter(None, texts):
        ids = torch.tensor([[base_tokenizer.bos_token_id, *base_tokenizer(text).input_ids]])
        bits += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1) / math.log(2)
    found = bits_per_byte(model, base_tokenizer, texts, 64)
    assert found["value"] == pytest.approx(bits / sum(len(t.encode()) for t in texts), rel=1e-5) and found["n"] == 2


def test_a_long_text_is_read_in_windows_that_see_the_token_before(base_tokenizer):
    model, text, size = new_llama(base_tokenizer), "One day Tom found a kite by the river. It was broken.", 6
    ids = base_tokenizer(text).input_ids
    assert len(ids) > 2 * size
    bits = 0.0
    for context, part in rolling_windows(ids, base_tokenizer.bos_token_id, size - 1):
        logps = model(input_ids=torch.tensor([context + part])).logits[0].log_softmax(-1)
        assert len(context + part) <= size
        bits -= sum(logps[len(context) - 1 + i, token].item() for i, token in enumerate(part)) / math.log(2)
    assert bits_per_byte(model, base_tokenizer, [text], size)["value"] == pytest.approx(bits / len(text), rel=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "mamba"])
def test_learned_positions_alibi_and_recurrent_states_are_read_right(base_tokenizer, kind):
    """Two texts of several windows each, whose rows must neither see each other nor run out of positions."""
    from transformers import AutoConfig, AutoModelForCausalLM

    width = {"n_embd": 32, "n_positions": 16} if kind == "gpt2" else {"hidden_size": 32}
    heads = {} if kind == "mamba" else {"n_head": 2}
    config = AutoConfig.for_model(kind, vocab_size=len(base_tokenizer), num_hidden_layers=2, **width, **heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    texts, bits = ["One day Tom found a kite by the river. It got wet.", "Anna likes plums best. Max has a goat."], 0.0
    for text in texts:
        for context, part in rolling_windows(base_tokenizer(text).input_ids, base_tokenizer.bos_token_id, 15):
            with torch.no_grad():
                logps = model(input_ids=torch.tensor([context + part])).logits[0].log_softmax(-1)
            bits -= sum(logps[len(context) - 1 + i, token].item() for i, token in enumerate(part)) / math.log(2)
    found = bits_per_byte(model, base_tokenizer, texts, 16)
    assert found["value"] == pytest.approx(bits / sum(map(len, texts)), rel=1e-5)


# --- answers after examples


def greedy_line(model, tokenizer, prompt: str, tokens: int) -> str:
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt).input_ids]])
    new = model.generate(ids, do_sample=False, max_new_tokens=tokens)[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True).split("\n")[0].strip()


def test_exact_matches_are_counted_after_the_rows_that_are_shown(base, base_tokenizer, tmp_path):
    """Outputs are what transformers says greedily, but for one of three: two thirds match."""
    model = new_llama(base_tokenizer)
    shown = [{"input": "Sum: 1+1.", "output": "2"}, {"input": "Sum: 2+1.", "output": "3"}]
    before = "Sum: 1+1. 2\nSum: 2+1. 3\n"
    asked = ["Sum: 1+2.", "Tom has a", "Anna likes"]
    rows = shown + [{"input": text, "output": greedy_line(model, base_tokenizer, before + text, 6)} for text in asked]
    assert all(row["output"] for row in rows)
    rows[-1]["output"] += "x"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--few_shot", tmp_path / "rows.jsonl", "--num_fewshot", 2, "--max_tokens", 6)
    found = measured(base, tmp_path / "found.json", *flags)
    figure = found["metrics"]["exact match after 2 examples"]
    assert figure["value"] == pytest.approx(2 / 3) and figure["n"] == 3
    assert [row["input"] for row in found["answers"]] == asked
    with pytest.raises(UserError, match="--num_fewshot: found 5, .* has 5 rows"):
        command(["eval", base, "--few_shot", str(tmp_path / "rows.jsonl"), "--num_fewshot", "5"])


def test_prompts_longer_than_the_context_are_refused(base_tokenizer):
    engine = HFEngine(new_llama(base_tokenizer), base_tokenizer.pad_token_id)
    with pytest.raises(UserError, match="a prompt and its answer take .* the model's context has 20"):
        few_shot_answers(engine, base_tokenizer, ["a", "x" * 20], 8, 20, 0)


# --- the tiny world


def test_facts_and_how_often_they_stand_in_the_documents():
    documents = [row["text"] for row in tiny.rows("documents", "train", 2000, 3)]
    found, people = tiny_evals.facts(3, documents), make_world(3).people
    assert len(found) == 4 * len(people)
    sentences = [fact_sentence(person, attribute) for person in people for attribute in ATTRIBUTES]
    for fact, sentence in zip(found, sentences, strict=True):
        assert f"{fact['prompt']} {fact['answer']}" in sentence and fact["answer"] in fact["values"]
        assert fact["times"] == sum(text.count(sentence) for text in documents)
    assert found[0]["times"] > 100 > found[-1]["times"]  # Zipf
    assert tiny_evals.says("soup", "soup best.") and not tiny_evals.says("soup", "soups.")
    assert not tiny_evals.says("soup", "a soup")


def test_a_model_that_knows_some_facts_is_found_to(base_tokenizer, tmp_path):
    """Trained on the facts of the ten people most is written about, and on no others."""
    known = tiny_evals.facts(0, [])[:40]
    world = make_world(0)
    texts = [fact_sentence(person, attribute) for person in world.people[:10] for attribute in ATTRIBUTES]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = new_llama(base_tokenizer).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        rows = [[base_tokenizer.eos_token_id, *base_tokenizer(text).input_ids] for text in texts]
        width = max(map(len, rows))
        ids = torch.tensor([row + [base_tokenizer.pad_token_id] * (width - len(row)) for row in rows])
        labels = ids.masked_fill(ids == base_tokenizer.pad_token_id, -100)
        for _ in range(100):
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    save_pair(model.eval(), base_tokenizer, tmp_path / "model")
    found = measured(str(tmp_path / "model"), tmp_path / "a.json", "--suite", "tiny", "--rows", 3000)["metrics"]
    classes = {name: figure for name, figure in found.items() if name.startswith("facts, read")}
    assert sum(figure["n"] for figure in classes.values()) == found["facts"]["n"] == 400
    assert 0.1 <= found["facts"]["value"] < 0.35  # a tenth by heart, some of the others by luck
    values = [figure["value"] for figure in classes.values()]
    assert max(values) == values[-1] > 0.9 > values[0] and len(values) > 2
    assert found["facts, guessed"]["value"] == pytest.approx((1 / 20 + 1 / 10 + 1 / 8 + 1 / 8) / 4)
    assert found["bits per byte"]["value"] > found["bits per byte, byte trigram"]["value"]
    assert known[0]["times"] == 0


def test_the_examples_are_facts_of_the_tiny_world():
    facts = {fact["prompt"]: fact for fact in tiny_evals.facts(0, [])}
    rows = [json.loads(line) for line in (EXAMPLES / "few_shot_facts.jsonl").read_text().splitlines()]
    assert len(rows) == 64 and all(row["output"].startswith(facts[row["input"]]["answer"]) for row in rows)
    rows = [json.loads(line) for line in (EXAMPLES / "lm_eval_tasks/tiny_facts.jsonl").read_text().splitlines()]
    assert len(rows) == 100
    for row in rows:
        assert row["choices"] == facts[row["question"]]["values"]
        assert row["choices"][row["label"]] == facts[row["question"]]["answer"]


# --- the verb


def test_texts_give_bits_and_a_floor_and_the_same_again(base, tmp_path, capsys, base_tokenizer):
    flags = ("--data", "tiny", "--data_config", "documents", "--rows", 8, "--train_data", "tiny", "--train_rows", 50)
    found = measured(base, tmp_path / "a.json", *flags)
    lines = capsys.readouterr().out.splitlines()
    texts = [row["text"] for row in tiny.rows("documents", "test", 8, 0)]
    expected = bits_per_byte(new_llama(base_tokenizer), base_tokenizer, texts, 1024)
    assert found["metrics"]["bits per byte"] == pytest.approx(expected)
    assert [line.split("  ")[0] for line in lines] == ["bits per byte", "bits per byte, byte trigram"]
    assert measured(base, tmp_path / "b.json", *flags)["metrics"] == found["metrics"]
    assert set(found["model"]["sha256"]) == {"model.safetensors", "config.json", "tokenizer.json"}
    assert found["settings"]["rows"] == 8 and found["versions"]["torch"] == torch.__version__
    assert found["data"]["rows"] == 8 and found["train_data"]["rows"] == 50


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "nothing to measure"),
        (("--few_shot", "none.jsonl"), "--few_shot: none.jsonl: No such file"),
        (("--data", "tiny", "--data_config", "rankings"), "is no reward model (LlamaForCausalLM), so rows of text"),
        (("--tasks", " , "), "--tasks: no name given"),
        (("--suite", "tiny", "--train_data", "tiny"), "--train_data: does nothing without --data"),
        (("--suite", "tiny", "--limit", "3"), "--limit: does nothing without --tasks"),
    ],
)
def test_what_cannot_be_measured_is_refused(base, flags, words):
    with pytest.raises(UserError) as error:
        command(["eval", base, *flags])
    assert words in str(error.value)


def test_a_reward_model_takes_rankings_alone(base, base_tokenizer, tmp_path):
    save_pair(load_scalar_model(ModelConfig(base)), base_tokenizer, tmp_path)
    with pytest.raises(UserError, match="--tasks: for base models"):
        command(["eval", str(tmp_path), "--tasks", "x"])
    with pytest.raises(UserError, match="--suite tiny: .* it is a reward model, which writes no replies"):
        command(["eval", str(tmp_path), "--suite", "tiny"])
    with pytest.raises(UserError, match="--data: not given"):
        command(["eval", str(tmp_path)])
