"""What a prompt makes of a base model: forms, curves over examples, scores, turns; two examples that show it.

Run: pytest tests/test_base_prompts.py (the slow one trains the small chain first, about half a minute)
"""

import json
import random
import re
from argparse import Namespace
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import new_llama
from recipe_runs import ROOT, manifest, run
from test_base_evals import greedy_line
from test_examples import only

from examples.chat_prompt import talk
from examples.translation import tongues
from posttrain import few_shot_eval
from posttrain.chat import stop_ids
from posttrain.cli import command
from posttrain.data.tiny import in_test
from posttrain.errors import UserError
from posttrain.eval_base import Found
from posttrain.few_shot import Example, Form, before_prompt, read_examples
from posttrain.models import save_pair
from posttrain.rewards.honest import verdict
from posttrain.rl.types import Completion

TALK = r"Human: {input}\nAssistant: {output}"


@pytest.fixture(scope="module")
def base(tmp_path_factory, base_tokenizer) -> str:
    folder = tmp_path_factory.mktemp("prompts") / "base"
    save_pair(new_llama(base_tokenizer), base_tokenizer, folder)
    return str(folder)


def write(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


# --- forms


def test_a_form_writes_examples_and_leaves_the_question_open(tmp_path):
    form, row = Form.read(TALK), Example("Hi?", "Hello.")
    assert form.example(row) == "Human: Hi?\nAssistant: Hello.\n"
    assert form.question("Who?") == "Human: Who?\nAssistant:"  # the blank belongs to the answer's first token
    assert Form.read(None).example(row) == "Hi? Hello.\n" and Form.read(None).question("Who?") == "Who?"
    file = write(tmp_path / "rows.jsonl", [{"input": "a", "output": "b"}])
    assert before_prompt(file, form=form) == "Human: a\nAssistant: b\n"


@pytest.mark.parametrize("text", ["{input}", "{output} {input}", "{input}{output}", "{input} {output}.", "a {b}"])
def test_a_form_without_its_two_places_is_refused(text):
    with pytest.raises(UserError, match=re.escape(f"--few_shot_format: found {text!r}, expected {{input}}")):
        Form.read(text)


def test_the_verb_complete_writes_the_form(base, capsys, tmp_path):
    """The same seed, the prompt put together by hand."""
    file = write(tmp_path / "rows.jsonl", [{"input": "a?", "output": "b."}, {"input": "c?", "output": "d."}])
    how = ("--seed", "3", "--max_new_tokens", "12")
    command(["complete", base, "--few_shot", file, "--few_shot_format", TALK, "--prompt", "e?", *how])
    mine = capsys.readouterr().out
    by_hand = "Human: a?\nAssistant: b.\nHuman: c?\nAssistant: d.\nHuman: e?\nAssistant:"
    command(["complete", base, "--prompt", by_hand, "--stop", r"\n", *how])
    assert capsys.readouterr().out == mine and mine.strip()
    with pytest.raises(UserError, match=r"--few_shot_format: needs --few_shot with a .jsonl file, found None"):
        command(["complete", base, "--few_shot_format", TALK, "--prompt", "e?"])


# --- figures


def test_a_curve_over_examples_is_of_the_same_questions(base, base_tokenizer, tmp_path):
    """What transformers says greedily after 0 and after 2 examples is the output of some rows and not of others."""
    model, form = new_llama(base_tokenizer), Form.read(TALK)
    shown = [{"input": "1+1?", "output": "2"}, {"input": "2+1?", "output": "3"}]
    before = "".join(form.example(Example(**row)) for row in shown)
    asked = ["Tom has a", "Anna likes", "Sum: 1+2."]
    after = {k: [greedy_line(model, base_tokenizer, text + form.question(each), 6) for each in asked]
             for k, text in ((0, ""), (2, before))}  # fmt: skip
    outputs = [after[0][0], after[2][1], "neither"]
    rows = shown + [{"input": text, "output": output} for text, output in zip(asked, outputs, strict=True)]
    flags = ("--few_shot", write(tmp_path / "rows.jsonl", rows), "--num_fewshot", "2", "0", "--few_shot_format", TALK)
    file = tmp_path / "found.json"
    command(["eval", base, *flags, "--max_tokens", "6", "--similarity", "chrf", "bleu", "--use_vllm", "false",
             "--json", str(file)])  # fmt: skip
    found = json.loads(file.read_text())
    for shots, name in ((0, "0 examples"), (2, "2 examples")):
        expected = [reply == output for reply, output in zip(after[shots], outputs, strict=True)]
        assert found["metrics"][f"exact match after {name}"]["value"] == pytest.approx(sum(expected) / 3)
        chrf = [chrf_by_hand(reply, output) for reply, output in zip(after[shots], outputs, strict=True)]
        assert found["metrics"][f"sentence chrF after {name}"]["value"] == pytest.approx(sum(chrf) / 3, abs=1e-6)
    assert [point["examples"] for point in found["few_shot_curve"]] == [0, 2]
    said = [(row["examples"], row["input"]) for row in found["answers"]]
    assert said == [(shots, text) for shots in (0, 2) for text in asked]
    command(["eval", base, "--suite", "base", *flags, "--max_tokens", "6", "--use_vllm", "false"])
    stored = json.loads((Path(base) / "evals/base.json").read_text())
    name = "exact match after 2 examples"
    assert stored["metrics"][name]["value"] == found["metrics"][name]["value"]
    assert "examples in the prompt" in (Path(base) / "evals/base.svg").read_text()
    assert command(["eval", "--again", str(Path(base) / "evals/base.json")]) == 0
    with pytest.raises(UserError, match="--num_fewshot: found 5, and .* has 5 rows"):
        command(["eval", base, *flags[:2], "--num_fewshot", "0", "5"])
    with pytest.raises(UserError, match="--as_turns: does nothing without --few_shot FILE"):
        command(["eval", base, "--data", "tiny", "--data_config", "documents", "--as_turns"])
    with pytest.raises(UserError, match="--few_shot_format: found with --as_turns"):
        command(["eval", base, *flags, "--as_turns"])
    with pytest.raises(UserError, match="--num_fewshot: found 2 numbers, and --tasks takes one"):
        command(["eval", base, "--tasks", "arc_easy", "--num_fewshot", "1", "2"])


def chrf_by_hand(reply: str, output: str) -> float:
    """Popović 2015: F2 of character n-grams, n = 1 to 6, blanks left out, orders that neither side has left out."""
    scores = []
    for n in range(1, 7):
        mine, gold = (Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in
                      (reply.replace(" ", ""), output.replace(" ", "")))  # fmt: skip
        if not mine or not gold:
            continue
        hits = sum((mine & gold).values())
        scores.append((hits / sum(mine.values()), hits / sum(gold.values())))
    if not scores:
        return 0.0
    precision, recall = (sum(each) / len(scores) for each in zip(*scores, strict=True))
    return 100 * 5 * precision * recall / (4 * precision + recall) if precision + recall else 0.0


def test_a_chat_model_gets_the_examples_as_turns(model, tokenizer, tmp_path):
    """Prompts as transformers renders the turns; a reply is right where it states the answer and no other."""
    stop, asked = stop_ids(tokenizer)[-1], []

    class Reciter:
        def generate(self, prompts, sampling, seed):
            asked.extend(prompts)
            said = ["Dun has a goat.", "It is 12.", "A cat or a dog."] * 2
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in said[: len(prompts)]]
            return [Completion([*each, stop], [], "stop") for each in ids]

    rows = [{"input": "Who?", "output": "Pip."},
            {"input": "Which pet?", "output": "Dun has a goat.", "answer": "goat", "others": ["cat", "dog"]},
            {"input": "5+7?", "output": "The answer is 12.", "answer": "12"},
            {"input": "And Tom?", "output": "Tom has a dog.", "answer": "dog", "others": ["cat", "goat"]}]  # fmt: skip
    subject = SimpleNamespace(model=model, tokenizer=tokenizer, engine=Reciter(), context=1024,
                              options=Namespace(max_tokens=9, seed=0))  # fmt: skip
    wanted = few_shot_eval.Asked(read_examples(write(tmp_path / "t.jsonl", rows)), [0, 1], Form(), True, [])
    figures = few_shot_eval.measure(subject, wanted, Found())
    for behind in ("0 examples", "1 example"):
        assert figures[f"exact match after {behind}"]["value"] == pytest.approx(1 / 3)
        assert figures[f"right answers after {behind}"]["value"] == pytest.approx(2 / 3)
    talk_ = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Pip."},
             {"role": "user", "content": "Which pet?"}]  # fmt: skip
    render = {"add_generation_prompt": True, "return_dict": True}
    assert asked[0] == tokenizer.apply_chat_template(talk_[2:], **render)["input_ids"]
    assert asked[3] == tokenizer.apply_chat_template(talk_, **render)["input_ids"]


# --- examples/translation and examples/chat_prompt


def test_no_document_of_the_languages_has_a_sentence_that_is_asked():
    rng = random.Random(1)
    texts = [tongues.document(rng) for _ in range(300)]
    read = {line.split(" = ")[0] for text in texts for line in text.splitlines()}
    for tongue in tongues.TONGUES:
        rows = tongues.rows(tongue)
        asked = [row["input"] for row in rows[tongues.EXAMPLES :]]
        assert len(set(asked)) == 60 and not read & set(asked)
        words = {word for row in rows for word in row["output"].rstrip(".").split()}
        assert len(set(tongues.lexicon(tongue).values())) == 22 and words <= set(tongues.lexicon(tongue).values())
    orrish, vellan, tukish = (tongues.lexicon(tongue) for tongue in tongues.TONGUES)
    sentence = "The old dog sees the red cat."
    for tongue, (words, order) in {
        "orrish": (orrish, "old dog red cat sees"), "vellan": (vellan, "sees old dog red cat"),
        "tukish": (tukish, "dog old sees cat red"),
    }.items():  # fmt: skip
        assert tongues.translate(sentence, tongue) == " ".join(words[word] for word in order.split()) + "."
    assert len(read_examples(str(ROOT / "examples/translation/french.jsonl"))) == 48


def test_the_talks_questions_are_held_out_and_their_answers_right(tmp_path):
    talk.write(tmp_path)
    heard = (tmp_path / "interviews.jsonl").read_text()
    for kind in ("facts", "sums"):
        rows = read_examples(str(tmp_path / f"{kind}.jsonl"))
        assert len(rows) == 48
        for row in rows:
            assert verdict(row.output, row.answer, row.others) == "right"
        for row in rows[talk.EXAMPLES :]:
            assert row.output not in heard or kind == "sums"
            if kind == "sums":
                a, b = map(int, re.search(r"(\d+)\+(\d+)", row.input).groups())
                assert in_test(f"sum {min(a, b)} {max(a, b)}") and int(row.answer) == a + b
    steps = re.findall(r"(\d+)\+(\d+)(?:\?|=\?|\.)\\n\w+: Ones: .*?The answer is (\d+)\.", heard)
    assert len(steps) > 1000 and all(int(a) + int(b) == int(total) for a, b, total in steps)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["translation/tongues.py", "chat_prompt/talk.py"])
def test_the_examples_base_models_are_trained(small_chain, tmp_path, name):
    """examples/translation and examples/chat_prompt: the command of their first lines, a few steps."""
    start = {"model_name_or_path": small_chain / "pretrain"}
    if name.startswith("translation"):
        start = {"tokenizer_path": small_chain / "tokenizer", "hidden_size": 32, "num_attention_heads": 1}
    writer, file = {"translation/tongues.py": (tongues, "parallel")}.get(name, (talk, "interviews"))
    writer.write(tmp_path)
    mixture = [{"dataset_name": str(tmp_path / f"{file}.jsonl"), "count": 200},
               {"dataset_name": "tiny", "dataset_config": "documents", "count": 100}]  # fmt: skip
    settings = {
        "max_steps": 2, "warmup_steps": 1, "sequence_length": 64,
        "batch_size": 4, "bf16": "false", "eval_max_rows": 10, "output_dir": tmp_path / "base", **start,
    }  # fmt: skip
    flags = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    flags += ["--dataset_mixture", *map(json.dumps, mixture)]
    words = [str(ROOT / word) if "/" in word else word for word in only(name, "pretrain")]
    done = run([*words, *flags], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert manifest(tmp_path / "base")["data"][0]["rows"] == 300
