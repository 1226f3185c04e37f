"""`posttrain template list | show | check | diff`, as users call it. Run: pytest tests/test_template_view.py"""

import re
from copy import deepcopy
from pathlib import Path

import pytest
from conftest import CHATML
from template_helpers import FOLDER, NAMES, source, with_template

from posttrain.cli import command
from posttrain.errors import UserError
from posttrain.templates import end_token_outside, no_end_token, not_prefix_preserving, template_faults, unmarked

MARKED = "{%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}"
HEAD = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant<|im_sep|>' -}}{%- endif -%}"
LAST_ONLY = (
    "{%- generation -%}{{- ('(' if loop.last else '') + message.content + '<|im_end|>' -}}{%- endgeneration -%}"
)
PAST = "not prefix-preserving, with several turns and"

# As users meet them: (what is taken out of chatml.jinja, what stands there instead, the fault's words)
BROKEN = {
    "no marks": (
        MARKED,
        "{{- message.content + '<|im_end|>' -}}",
        "has no generation marks: nothing would be learned",
    ),
    "end token outside": (
        MARKED,
        "{%- generation -%}{{- message.content -}}{%- endgeneration -%}{{- '<|im_end|>' -}}",
        "leaves the turn's end token '<|im_end|>' outside the generation mark",
    ),
    "no end token": (MARKED, MARKED.replace("<|im_end|>", "\\n"), "ends a reply with no control token"),
    "a last turn that looks otherwise": (MARKED, LAST_ONLY, PAST),
    "another header at generation": (
        HEAD,
        HEAD.replace("assistant<", "bot<"),
        r"generation differs from training, with several turns and \d+ more of \d+ conversations: the reply in mess",
    ),
    "no refusals": (
        re.search(r"\{%- if tools.*?endif -%\}\n", source("chatml"))[0],
        "",
        "dropped without a word: lists of tools; refuse them with raise_exception",
    ),
    "a token too many": (
        "<|im_sep|> <|im_end|> -#}",
        "<|im_sep|> <|im_end|> <|tool|> -#}",
        "'<|tool|>' is declared but",
    ),
}


@pytest.fixture
def posttrain(capsys):
    def run(*arguments) -> tuple[int, str]:
        code = command(["template", *map(str, arguments)])
        return code, capsys.readouterr().out

    return run


def test_list_says_what_each_can_do(posttrain):
    code, text = posttrain("list")
    head, *lines = text.splitlines()
    assert code == 0 and head.split() == ["name", "prefix-preserving", "system", "tools", "reasoning"]
    found = {line.split()[0]: line.split()[1:5] for line in lines}
    assert list(found) == NAMES
    assert found["chatml"] == ["yes", "yes", "no", "no"] and found["qwen3"] == ["no", "yes", "yes", "yes"]
    assert found["mistral"] == ["yes", "yes", "yes", "no"] and found["deepseek_r1"] == ["yes", "yes", "no", "yes"]
    assert "ChatML with a separator, the default and Phi-4's" in lines[0]
    assert max(map(len, lines)) < 120


def test_show_prints_the_source_and_marks_what_is_learned(posttrain):
    code, text = posttrain("show", "llama3")
    assert code == 0 and source("llama3").rstrip() in text
    assert text.count("<|start_header_id|>assistant<|end_header_id|>\n\n⟦It is 7.<|eot_id|>⟧") == 1
    assert text.count("⟦") - 1 == text.count("⟧") - 1 == 2  # once each in the heading
    assert text.endswith("And 3+4?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n\n")


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"qwen3"}))
def test_check_finds_no_fault_in_what_is_shipped(posttrain, name):
    code, text = posttrain("check", name)
    assert code == 0 and re.search(r"^faults +none$", text, re.MULTILINE), text


def test_check_finds_that_qwen_3_drops_thoughts(posttrain, tmp_path, base_tokenizer):
    base_tokenizer.save_pretrained(tmp_path / "tokenizer")
    code, text = posttrain("check", FOLDER / "qwen3.jinja", "--tokenizer", tmp_path / "tokenizer")
    assert code == 1 and re.search(r"^faults +1$", text, re.MULTILINE)
    assert f"1. {PAST}" in text and "'It' (" in text and "once more turns follow: token" in text


@pytest.mark.parametrize("name", BROKEN)
def test_check_names_the_fault(posttrain, tmp_path, name):
    old, new, words = BROKEN[name]
    path = tmp_path / "mine.jinja"
    assert old in source("chatml")
    path.write_text(source("chatml").replace(old, new))
    code, text = posttrain("check", path)
    assert code == 1 and re.search(words if "\\d" in words else re.escape(words), text), text


def test_check_of_a_hostile_template_is_an_error(posttrain, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{{ ''.__class__ }}")
    with pytest.raises(UserError, match="is not safe to render"):
        posttrain("check", path)


def test_the_checks_agree_with_trls_on_trls_templates(base_tokenizer):
    """Its training templates and the originals they were made from, where its checks and ours ask the same."""
    from importlib.util import find_spec

    from trl.chat_template_utils import has_generation_markers, is_chat_template_stop_token_trained

    folder = Path(find_spec("trl").origin).parent / "chat_templates"
    seen = set()
    for name in ("llama3", "gemma", "qwen3", "cohere"):
        for kind in ("", "_training"):
            tokenizer = with_template(base_tokenizer, (folder / f"{name}{kind}.jinja").read_text(encoding="utf-8"))
            marked = has_generation_markers(tokenizer.chat_template)
            assert (unmarked(tokenizer) is None) == marked
            if marked:
                trained = is_chat_template_stop_token_trained(tokenizer)
                assert (end_token_outside(tokenizer) is None and no_end_token(tokenizer) is None) == trained
            seen.add((marked, not_prefix_preserving(tokenizer) is None))
    assert seen == {(True, True), (False, True), (False, False)}


def test_faults_of_a_tokenizer_whose_template_is_sound(tokenizer):
    assert template_faults(tokenizer) == []
    mine = deepcopy(tokenizer)
    mine.chat_template = source("chatml").replace("generation -%}", "generation -%} ")
    assert template_faults(mine) == []


def test_diff_of_two_templates_shows_where_they_part(posttrain):
    code, text = posttrain("diff", "qwen3", "qwen3_keep_thinking")
    assert code == 0 and text.startswith("--- qwen3\n+++ qwen3_keep_thinking\n")
    assert "+<think>" in text and "-<think>" not in text
    same, of = map(int, re.search(r"(\d+) of (\d+) renders are the same", text).groups())
    assert 0 < same < of
    code, text = posttrain("diff", "chatml_plain", "chatml_tools")
    assert "(refused: " in text and "+<tool_call>" in text


def test_diff_with_a_models_folder(posttrain, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "model")
    assert posttrain("diff", tmp_path / "model", "chatml") == (0, "18 of 18 renders are the same\n")
    code, text = posttrain("diff", CHATML, tmp_path / "model")
    assert "18 of 18" in text


def test_names_that_do_not_exist(posttrain, base_tokenizer, tmp_path):
    with pytest.raises(UserError, match="no file and no name 'lama3'; there are chatml, chatml_calls"):
        posttrain("show", "lama3")
    base_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no chat template"):
        posttrain("diff", tmp_path, "chatml")
