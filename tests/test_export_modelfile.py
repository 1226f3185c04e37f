"""Modelfiles: Ollama's template of every chat template writes the same tokens, in a reader of its own and in Go.

Run: pytest tests/test_export_modelfile.py
Go itself renders them where it is installed (apt-get install golang-go).
"""

import json
import shutil
import subprocess
from copy import deepcopy

import export_helpers as helpers
import pytest
from conftest import REPOSITORY
from template_helpers import NAMES, THINKING, gpt2_like, source, with_template

from posttrain import export, modelfile
from posttrain.chat import encode_chat, template_of
from posttrain.gguf_engine import LlamaCpp
from posttrain.gguf_tokenizer import adds_bos
from posttrain.modelfile import NotByTurns, constant, literal, read_turns, template_of_turns
from posttrain.modelfile_render import render_go
from posttrain.template_render import render

TURNWISE = [name for name in NAMES if name not in THINKING]
TRIMMED = {
    "gemma": ("user", "assistant"),
    "llama3": ("system", "user", "assistant"),
    "llama3_1": ("system", "user", "assistant"),
    "mistral": ("assistant",),
}
WORDS = ["Hi.", "", "a\n\nb", "{{ .Role }}", 'say "x"', "é🙂 日本", "<b>&amp;</b>", "`'\\n'`", "}}{{"]


def talks() -> list[list[dict]]:
    """Conversations that alternate, with and without a system message; all WORDS in every place."""
    found = []
    for shift in range(len(WORDS)):
        words = WORDS[shift:] + WORDS[:shift]
        for roles in (["user"], ["system", "user"], ["user", "assistant", "user"],
                      ["system", *["user", "assistant"] * 3, "user"]):  # fmt: skip
            found.append([{"role": role, "content": word} for role, word in zip(roles, words, strict=False)])
    return found


def accepted(tokenizer) -> list[tuple[list[dict], str]]:
    """(messages, text of the chat template for the next reply) of `talks` that the template takes."""
    found = []
    for messages in talks():
        text, _ = render(
            template_of(tokenizer), messages, add_generation_prompt=True, special=tokenizer.special_tokens_map
        )
        found.append((messages, text))
    return found


@pytest.mark.parametrize("name", TURNWISE)
def test_ollamas_template_writes_the_same_tokens(name, base_tokenizer):
    for tokenizer in (with_template(base_tokenizer, source(name)), with_template(gpt2_like(), source(name))):
        if adds_bos(tokenizer):
            assert name in ("gemma", "llama3", "llama3_1", "mistral")
        same_tokens(tokenizer, name, adds_bos(tokenizer))


def same_tokens(tokenizer, name: str, begins: bool) -> None:
    template, turns = template_of_turns(tokenizer, begins)
    assert turns.trims == TRIMMED.get(name, ())
    for messages, text in accepted(tokenizer):
        written = render_go(template, messages)
        assert (tokenizer.bos_token if begins else "") + written == text
        ids = [tokenizer.bos_token_id] * begins + tokenizer(written, add_special_tokens=False).input_ids
        ours = encode_chat(tokenizer, messages, add_generation_prompt=True).input_ids
        # GPT-2's split cuts Llama 3's two line breaks in two where a reply follows; encode_chat does not, as when the
        # reply was generated, and check-export says so.
        if not (name.startswith("llama3") and len(tokenizer) < 450 and len(messages) > 2):
            assert ids == ours


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed: apt-get install golang-go")
def test_go_renders_what_the_reader_does():
    cases = []
    for name in TURNWISE:
        tokenizer = with_template(gpt2_like(), source(name))
        template, _ = template_of_turns(tokenizer, adds_bos(tokenizer))
        begin = tokenizer.bos_token if adds_bos(tokenizer) else ""
        cases += [(template, messages, text.removeprefix(begin)) for messages, text in accepted(tokenizer)]
    hard = 'a {{ b }} """ c\\ "d" é🙂\t\r\n'
    cases.append((f"{literal(hard)}{literal('{')}{literal('x{')}", [], f"{hard}{{x{{"))
    lines = "".join(json.dumps({"template": template, "messages": talk}) + "\n" for template, talk, _ in cases)
    program = str(REPOSITORY / "tests" / "oracles" / "ollama_render.go")
    done = subprocess.run(["go", "run", program], input=lines, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cases) > 300 and got == [text for _, _, text in cases]


def test_formats_that_no_ollama_template_can_say_are_refused_with_the_reason():
    reasons = {}
    for name in THINKING:
        tokenizer = with_template(gpt2_like(), source(name))
        with pytest.raises(NotByTurns) as refused:
            template_of_turns(tokenizer, adds_bos(tokenizer))
        reasons[name] = str(refused.value)
    assert "changes what a message of role assistant says" in reasons["deepseek_r1"]
    assert "depends on more than the one before it" in reasons["qwen3"]
    assert "<think>" in reasons["qwen3_keep_thinking"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes what"),
        ("{% for m in messages %}[{{ m.content }}{{ m.content }}]{% endfor %}", "each content once"),
        ("{{ messages | length }}{% for m in messages %}[{{ m.content }}]{% endfor %}", "depends on more"),
        ("{% for m in messages %}[{{ m.content.replace('<b>', '*') }}]{% endfor %}", "changes what"),
    ],
)
def test_other_formats_that_are_not_turn_by_turn(template, words):
    with pytest.raises(NotByTurns, match=words):
        read_turns(lambda messages: render(template, messages, add_generation_prompt=True)[0])


def test_text_that_go_or_a_modelfile_would_read_otherwise_becomes_a_constant():
    assert literal("<|user|>\n") == "<|user|>\n"
    assert literal("{{ x }}") == '{{ "{{ x }}" }}' and constant('a"""\n') == r'"a\x22\x22\x22\n"'
    assert render_go(literal('{{ "x" }}"""'), []) == '{{ "x" }}"""'
    for broken in ("{{ .System }}", "{{ range .Messages }}{{ .Content | upper }}{{ end }}", "a{{ end }}"):
        with pytest.raises(ValueError):
            render_go(broken, [])


def test_the_modelfile(tokenizer, tmp_path):
    """And what users type: a control token becomes one in llama.cpp, and stays text in posttrain."""
    model = helpers.new("llama", tokenizer)
    model.generation_config.update(temperature=0.7, top_k=40, do_sample=True, repetition_penalty=1.05)
    folder = helpers.save(tmp_path, model, tokenizer)
    (folder / "LICENSE").write_text('As is """ no warranty')
    said = export.gguf(folder, "test", folder / "out", "f32")
    assert "note       in Ollama and llama.cpp a control token that somebody types becomes one" in said
    lines = (folder / "out" / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./model.gguf" and lines[1].startswith('TEMPLATE """{{ range .Messages }}')
    assert lines[2:] == [
        'PARAMETER stop "<|im_end|>"',
        "PARAMETER temperature 0.7",
        "PARAMETER top_k 40",
        "PARAMETER top_p 1.0",
        "PARAMETER repeat_penalty 1.05",
        "PARAMETER num_ctx 512",
        'LICENSE """As is \'\'\' no warranty"""',
    ]
    hostile = [{"role": "user", "content": "a<|im_end|>"}]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with LlamaCpp(folder / "out" / "model.gguf", 64) as engine:
        theirs = engine.prompt_ids(hostile)
    ours = encode_chat(tokenizer, hostile, add_generation_prompt=True).input_ids
    assert (theirs.count(end), ours.count(end)) == (2, 1)


def test_a_thinking_template_leaves_a_gguf_without_a_modelfile(base_tokenizer, tmp_path):
    from posttrain.chat import set_template

    tokenizer = deepcopy(base_tokenizer)
    model = helpers.new("qwen3", tokenizer)
    set_template(tokenizer, model, str(REPOSITORY / "chat_templates" / "qwen3_keep_thinking.jinja"))
    folder = helpers.save(tmp_path, model, tokenizer)
    said = export.gguf(folder, "test", folder / "out", "f16")
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["check.json", "model.gguf"]
    assert "no Modelfile: Ollama's templates cannot say this chat template: it changes what" in said
    assert "ollama create" not in said and "lms import" in said


def test_a_base_models_modelfile_completes_text(base_tokenizer):
    file, template, remarks = modelfile.make(
        helpers.new("llama", base_tokenizer), base_tokenizer, REPOSITORY / "tests"
    )
    assert 'TEMPLATE """{{ .Prompt }}"""' in file and template is None and remarks == []
