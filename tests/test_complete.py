"""`posttrain complete` on small real models: what is drawn, where it ends, what is shown, what is refused.

Run: pytest tests/test_complete.py
"""

import io
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import new_llama
from hypothesis import given
from hypothesis import strategies as st
from page_reader import Page
from transformers import TopKLogitsWarper, TopPLogitsWarper

from posttrain import complete_view
from posttrain.cli import command
from posttrain.complete import Completer, StopGate
from posttrain.decoding import choose
from posttrain.errors import UserError
from posttrain.few_shot import before_prompt, first_line, read_examples
from posttrain.models import save_pair
from posttrain.rl.engine import Sampling
from posttrain.rl.hf_engine import HFEngine
from posttrain.rl.hf_sample import draw
from posttrain.rl.vllm_engine import sampling_fields


@pytest.fixture(scope="module")
def base(tmp_path_factory, base_tokenizer):
    """Folder of a base model whose choices are no ties: weights ten times as wide as usual."""
    model = new_llama(base_tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)
    folder = tmp_path_factory.mktemp("complete") / "base"
    save_pair(model, base_tokenizer, folder)
    return str(folder)


@pytest.fixture
def complete(base, capsys):
    """`complete(*flags)` runs the verb and returns what it wrote: out, err."""

    def run(*flags, model=base):
        assert command(["complete", str(model), *map(str, flags)]) == 0
        return capsys.readouterr()

    return run


# --- sampling


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), [(1.0, 1.0, 5), (0.7, 0.6, 20), (2.0, 0.9, 3)])
def test_top_k_then_top_p_draw_from_what_transformers_would(temperature, top_p, top_k):
    logits = torch.randn(60, generator=torch.Generator().manual_seed(3)) * 2
    warped = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, logits[None] / temperature))[0].softmax(-1)
    generator = torch.Generator().manual_seed(0)
    alone = torch.tensor([choose(logits, temperature, top_p, generator, top_k) for _ in range(8000)])
    sampling = Sampling(1, 1, (), temperature, top_p, top_k)
    batched, logps = draw(logits.expand(8000, -1), sampling, generator)
    for drawn in (alone, batched):
        shares = drawn.bincount(minlength=60) / 8000
        assert (shares - warped).abs().max() < 0.02
        assert not shares[warped == 0].any()
    torch.testing.assert_close(logps, warped.log()[batched])


def test_top_k_reaches_every_engine(base_tokenizer):
    """At top_k 1 only the likeliest token is left; the same field goes to vLLM."""
    model, prompts = new_llama(base_tokenizer), [[7, 8, 9], [20]]
    engine = HFEngine(model, base_tokenizer.pad_token_id)
    found = engine.generate(prompts, Sampling(1, 6, (), temperature=1.0, top_k=1), seed=9)
    greedy = engine.generate(prompts, Sampling(1, 6, (), temperature=0.0), seed=0)
    assert [c.ids for c in found] == [c.ids for c in greedy]
    engine.plain = False  # transformers' own generate
    assert [c.ids for c in engine.generate(prompts, Sampling(1, 6, (), 1.0, 1.0, 1), seed=9)] == [
        c.ids for c in greedy
    ]
    assert sampling_fields(Sampling(1, 6, (), top_k=12))["top_k"] == 12


# --- where a continuation ends


@given(
    st.lists(st.text("ab\n", max_size=4)), st.lists(st.text("ab\n", min_size=1, max_size=3), min_size=1, max_size=3)
)
def test_text_ends_before_the_first_stop_however_it_comes_in_pieces(pieces, stops):
    gate, out = StopGate(tuple(stops)), ""
    whole = "".join(pieces)
    places = [whole.find(stop) for stop in stops if stop in whole]
    expected = whole[: min(places)] if places else whole
    for piece in pieces:
        out += gate.add(piece)
        assert expected.startswith(out)
    assert out + gate.end() == gate.text == expected and gate.stopped == bool(places)


def test_the_greedy_text_is_transformers_own(complete, base, base_tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    ids = [base_tokenizer.bos_token_id, *base_tokenizer("One day").input_ids]
    new = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)[0, len(ids) :]
    text = base_tokenizer.decode(new, skip_special_tokens=True)
    for flags in (("--temperature", 0), ("--top_k", 1)):
        out, err = complete("--prompt", "One day", "--max_new_tokens", 12, *flags)
        assert out == text + "\n" and "One day" not in out
        assert ("cut: max_new_tokens 12" in err) == (len(new) == 12)
    stop = text[4:6]
    out, _ = complete("--prompt", "One day", "--max_new_tokens", 12, "--temperature", 0, "--stop", stop)
    assert out == text[: text.index(stop)] + "\n"


def test_samples_hang_on_seed_and_number_alone(complete):
    flags = ("--prompt", "The", "--max_new_tokens", 8)
    three = complete(*flags, "--n", 3, "--seed", 5)
    assert complete(*flags, "--n", 3, "--seed", 5).out == three.out and "[seed 5]" in three.err
    parts = three.out.split("--- ")[1:]
    assert [part.split("\n")[0] for part in parts] == ["1 of 3", "2 of 3", "3 of 3"] and len(set(parts)) == 3
    assert complete(*flags, "--seed", 5).out == parts[0].partition("\n")[2]
    assert complete(*flags, "--seed", 6).out != parts[0].partition("\n")[2]
    told = complete(*flags)
    seed = told.err.rpartition("[seed ")[2].rstrip("]\n")
    assert complete(*flags, "--seed", seed).out == told.out


def test_the_prompt_comes_from_flag_file_or_stdin(complete, tmp_path, monkeypatch):
    flags = ("--seed", 1, "--max_new_tokens", 8)
    given = complete("--prompt", "One day", *flags).out
    (tmp_path / "prompt.txt").write_text("One day\n")
    assert complete("--prompt_file", tmp_path / "prompt.txt", *flags).out == given
    monkeypatch.setattr(sys, "stdin", io.StringIO("One day\n"))
    assert complete(*flags).out == given
    assert complete("--prompt", "", *flags).out  # a document from its beginning


def test_a_chat_model_goes_on_from_raw_text(model, tokenizer):
    """No template and no token in front but what the tokenizer adds; a control token in the text is text."""
    ids = Completer(model, tokenizer).encode("Hi <|im_end|>")
    assert ids == tokenizer("Hi <|im_end|>", split_special_tokens=True).input_ids
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids


# --- examples


def test_examples_stand_before_the_prompt_and_a_line_break_ends_the_answer(complete, tmp_path):
    rows = [{"input": "a", "output": "b"}, {"prompt": " c ", "answer": "d"}, {"input": "e", "output": "f"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert before_prompt(str(file), 2) == "a b\nc d\n"
    (tmp_path / "block.txt").write_text("a b\nc d\ne f")
    assert before_prompt(str(tmp_path / "block.txt")) == before_prompt(str(file)) == "a b\nc d\ne f\n"
    flags = ("--max_new_tokens", 8, "--seed", 2)
    shown = complete("--few_shot", file, "--num_fewshot", 2, "--prompt", "e", *flags).out
    assert shown == complete("--prompt", "a b\nc d\ne", "--stop", r"\n", *flags).out
    assert shown.count("\n") == 1 and first_line(" x y \nz") == "x y"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: no JSON"),
        ('{"input": "a"}', "line 2: found input, expected the keys input and output"),
        ("[1]", "line 2: found list"),
        ('{"input": "a", "output": 3}', "line 2: output is 3, expected text"),
        ('{"prompt": "a", "answer": "x\\ny"}', "line 2: answer has a line break"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, line, words):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"input": "a", "output": "b"}\n' + line + "\n")
    with pytest.raises(UserError) as error:
        read_examples(str(file))
    assert f"{file}, {words}" in str(error.value)


# --- probabilities


def looked(base_tokenizer, text="One day Tom found a kite.\nIt was "):
    model = new_llama(base_tokenizer)
    prompt = Completer(model, base_tokenizer).encode(text)
    ids = [9, 10, 11]
    return model, prompt, ids, complete_view.look(model, base_tokenizer, prompt, [(ids, "end token")])


def test_probabilities_are_the_models_own(base_tokenizer):
    model, prompt, ids, [first, second] = looked(base_tokenizer)
    assert [t.id for t in first.tokens] == prompt and [t.id for t in second.tokens] == ids
    whole = torch.tensor([prompt + ids])
    tokens = first.tokens[1:] + second.tokens
    assert first.tokens[0].p is None
    loss = model(input_ids=whole, labels=whole).loss.item()
    assert math.fsum(t.nats for t in tokens) / len(tokens) == pytest.approx(loss, rel=1e-5)
    probs = model(input_ids=whole).logits[0, -2].softmax(-1)
    last = second.tokens[-1]
    assert (
        last.p == pytest.approx(probs[11].item())
        and last.rank == probs.argsort(descending=True).tolist().index(11) + 1
    )
    assert [p for _, p in last.others] == pytest.approx(probs.topk(5).values.tolist())
    size = len(b"One day Tom found a kite.\nIt was ")
    bits = math.fsum(t.nats for t in first.tokens[1:]) / math.log(2) / size
    assert f"{bits:.3f}"[:4] in first.summary() and "ended by end token" in second.summary()


def test_colours_only_where_asked_for_and_lines_that_fit(base_tokenizer):
    *_, shown = looked(base_tokenizer)
    text = complete_view.as_text(shown, 40, False)
    lines = [line for line in text.splitlines()[2:] if not line.startswith(("prompt:", "continuation:"))]
    assert "\x1b" not in text and 30 < max(map(len, lines)) <= 40
    assert "·day" in text and "⏎" in text and f"{shown[0].tokens[1].nats:.2f}" in text
    coloured = complete_view.as_text(shown, 40, True)
    assert coloured.count("\x1b[30;48;5;") >= len(shown[0].tokens) and "p >= 50 %" in coloured
    classes = [complete_view.Scored("x", 0, p).colour for p in (1.0, 0.5, 0.2, 0.05, 0.01, 0.0)]
    assert classes == [0, 0, 1, 2, 3, 4] and complete_view.Scored("x", 0, 0.0).nats == math.inf


def test_the_verb_prints_tokens_in_place_of_text(complete, tmp_path):
    page = tmp_path / "deep" / "page.html"
    out, err = complete("--prompt", "A b", "--probs", "--max_new_tokens", 4, "--n", 2, "--seed", 3, "--html", page)
    assert "\x1b" not in out and out.count("continuation ") == 2 and out.count("prompt: ") == 1
    assert "<|endoftext|>" in out and str(page) in err
    assert len(Page(page).tokens) >= 5


def test_the_page_is_inert_and_names_what_else_was_likely(base_tokenizer, tmp_path):
    *_, shown = looked(base_tokenizer, "<script>alert(1)</script>\"' onmouseover=x \u202e\x1b[2J & <b>")
    file = complete_view.write(shown, "<img src=x onerror=y>", {"seed": 1}, tmp_path / "page.html")
    page = Page(file)
    assert not {"script", "img", "b", "a", "link", "iframe"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on") or name in ("href", "src")]
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    source = file.read_text()
    assert "\u202e" not in source and "\x1b" not in source and "<img src=x onerror=y>" in page.text
    titles = [value for tag, name, value in page.attributes if (tag, name) == ("span", "title")]
    assert len(titles) == sum(len(passage.tokens) for passage in shown)
    token = shown[0].tokens[3]
    assert titles[3].startswith(f"p {100 * token.p:.2f} %, -log p {token.nats:.3f}, rank {token.rank}")
    assert titles[3].count("\n") == 5


# --- what is refused


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--n", "0"), "--n: found 0"),
        (("--n", "2", "--temperature", "0"), "--n: found 2 at --temperature 0"),
        (("--top_k", "-1"), "top_k is -1"),
        (("--top_p", "0"), "top_p is 0.0"),
        (("--stop", ""), "--stop: found an empty text"),
        (("--few_shot", "none.jsonl"), "--few_shot: none.jsonl: No such file"),
        (
            ("--few_shot", "examples/few_shot_facts.jsonl", "--num_fewshot", "65"),
            "--num_fewshot: found 65, expected 1 to 64",
        ),
        (("--few_shot", "examples/few_shot_facts.jsonl"), "the prompt has"),
    ],
)
def test_settings_out_of_range_are_refused(base, flags, words, monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    prompt = "x " * 600 if words == "the prompt has" else "x"
    with pytest.raises(UserError) as error:
        command(["complete", base, "--prompt", prompt, *flags])
    assert words in str(error.value)


def test_models_that_write_no_text_are_refused(tmp_path, base_tokenizer):
    from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForSequenceClassification

    small = {"vocab_size": len(base_tokenizer), "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    made = {
        "encoder": BertForMaskedLM(BertConfig(**small, num_attention_heads=2)),
        "reward model": LlamaForSequenceClassification(LlamaConfig(**small, num_attention_heads=2, pad_token_id=1)),
    }
    for what, model in made.items():
        save_pair(model, base_tokenizer, tmp_path / what)
        with pytest.raises(UserError, match=what):
            command(["complete", str(tmp_path / what), "--prompt", "x"])


def test_no_prompt_on_a_terminal_is_refused(base, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(UserError, match="no prompt: give --prompt TEXT"):
        command(["complete", base])
