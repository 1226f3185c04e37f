"""`posttrain inspect`: what it prints and writes is what the stage would train on, and its verdict the gate's.

Run: pytest tests/test_inspect.py
"""

import json
import os
import re
import shutil

import pytest
from conftest import REPOSITORY, new_llama
from page_reader import Page

from posttrain import cli, xray_text
from posttrain.conversations import token_reader
from posttrain.data import tiny
from posttrain.errors import UserError
from posttrain.models import save_pair

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2+3?"},
    {"role": "assistant", "content": "It is 5.\nSure."},
    {"role": "user", "content": "And 3+4?"},
    {"role": "assistant", "content": "It is 7."},
]
HOSTILE = (
    "<script>alert(1)</script><img src=http://x.y/z onerror='a()'>\"'></p></article><style>*{display:none}</style>"
    "{{ 7*7 }}{% raw %}&lt; \x1b[31mred\x07 \u202eabc <|im_end|>"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer, base_tokenizer):
    """Folders pretrain (no template), sft (ChatML) and words (a tokenizer alone)."""
    folder = tmp_path_factory.mktemp("models")
    save_pair(new_llama(base_tokenizer), base_tokenizer, folder / "pretrain")
    model = new_llama(tokenizer)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id]
    save_pair(model, tokenizer, folder / "sft")
    tokenizer.save_pretrained(folder / "words")
    return folder


@pytest.fixture
def data(tmp_path):
    """Writes rows and returns the file."""

    def write(rows):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return write


def inspect(*words) -> int:
    return cli.command(["inspect", *map(str, words)])


def tiny_config(stage, model, *words, **more):
    flags = [w for key, value in {"model_name_or_path": model, **more}.items() for w in (f"--{key}", value)]
    return inspect("--config", REPOSITORY / f"recipes/tiny/{stage}.yaml", "--max_rows", 50, *flags, *words)


def printed_row(text, name):
    """[(role, token, id, marked)] of a row, read off the two lines of each part."""
    block = text[text.index(f"\n{name}: ") + 1 :].split("\n\n")[0].splitlines()[1:]
    found, role = [], None
    for above, below in zip(block[::2], block[1::2], strict=True):
        role = above[: xray_text.LABEL].strip() or role
        ids = below.split()
        found += [
            (role, token, int(id.rstrip("*")), id.endswith("*"))
            for token, id in zip(above[xray_text.LABEL :].split(), ids, strict=True)
        ]
    return found


def test_a_printed_row_is_what_transformers_makes_of_it(models, tokenizer, data, capsys):
    assert inspect("--data", data([{"messages": TALK}] * 3), "--model", models / "sft", "--rows", 1) == 0
    said = capsys.readouterr().out
    found = printed_row(said, "row 0")
    expected = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    assert [id for _, _, id, _ in found] == expected["input_ids"]
    assert [int(marked) for *_, marked in found] == expected["assistant_masks"]
    lengths = [len(tokenizer.apply_chat_template(TALK[: n + 1])["input_ids"]) for n in range(5)]
    roles = [
        TALK[next(n for n, length in enumerate(lengths) if place < length)]["role"] for place in range(len(found))
    ]
    assert [role for role, *_ in found] == roles
    text = "".join(token for _, token, *_ in found).replace("·", " ").replace("⏎", "\n")
    assert text == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert "row 1" not in said.split("packed rows")[0]


def test_counts_are_those_of_all_rows(models, tokenizer, capsys):
    assert tiny_config("sft", models / "pretrain") == 0
    said = capsys.readouterr().out
    rows = list(tiny.rows("conversations", "train", 50, 0))
    chats = [
        tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        for row in rows
    ]
    tokens, learned = sum(len(c["input_ids"]) for c in chats), sum(sum(c["assistant_masks"]) for c in chats)
    sizes = sorted(len(c["input_ids"]) for c in chats)
    assert sizes[-1] <= 256 and f"50 rows, {tokens:,} tokens, {learned:,} supervised ({learned / tokens:.1%})" in said
    assert re.search(rf"tokens a row: {sizes[0]} \S.*\S {sizes[-1]}, median {sizes[25]}", said)
    count = dict.fromkeys(("system", "user", "assistant"), 0)
    for row in rows:
        before = 0
        for turn, message in enumerate(row["messages"], 1):
            size = len(tokenizer.apply_chat_template(row["messages"][:turn])["input_ids"])
            count[message["role"]] += size - before
            before = size
    shares = ", ".join(f"{role} {number / tokens:.1%}" for role, number in count.items())
    assert f"tokens by role: {shares} (of 50 rows)" in said
    contents = [m["content"] for row in rows for m in row["messages"]]
    size = sum(map(len, contents)) / sum(len(tokenizer(c, add_special_tokens=False)["input_ids"]) for c in contents)
    assert f"bytes a token, contents alone: {size:.3f}" in said
    assert said.rstrip().endswith("the gate lets this stage train: 13 conditions looked at")


def test_a_packed_row_shows_where_each_conversation_begins(models, capsys):
    assert tiny_config("sft", models / "pretrain") == 0
    packed = capsys.readouterr().out.split(" packed rows: 256 tokens")[1].split("\n\n")[0]
    begins = [line for line in packed.splitlines() if line.startswith("--- ")]
    assert len(begins) >= 2 and all(re.fullmatch(r"--- (row \d+|padding)", line) for line in begins)
    rows = list(tiny.rows("conversations", "train", 50, 0))
    for part, begin in zip(packed.split("--- ")[1:], begins, strict=True):
        if begin != "--- padding":
            content = rows[int(begin.split()[-1])]["messages"][0]["content"]
            text = "".join("".join(line[xray_text.LABEL :].split()) for line in part.splitlines()[1::2])
            assert content.replace(" ", "·") in text


def test_rows_that_the_gate_names_are_shown(models, data, capsys):
    rows = [{"messages": TALK[1:3]}] * 5 + [{"messages": TALK[1:2]}]
    words = ("--data", data(rows), "--model", models / "sft", "--rows", 1)
    assert inspect(*words) == 2
    said = capsys.readouterr().out
    assert "\nrow 5: " in said and "\nrow 4: " not in said
    assert "  REFUSED  no_assistant_turn\n           row 5: 0 assistant turns, found roles: user" in said
    assert said.rstrip().endswith("1 of 13 conditions not met; --allow NAME lets one pass")
    assert inspect(*words, "--allow", "no_assistant_turn") == 0
    assert "  allowed  no_assistant_turn" in capsys.readouterr().out
    with pytest.raises(UserError, match="allow: 'no_assistant' is no condition"):
        inspect(*words, "--allow", "no_assistant")


def test_what_is_cut_is_marked_so(models, tokenizer, data, capsys):
    most = len(tokenizer.apply_chat_template(TALK[:3])["input_ids"]) + 2  # within the second question
    assert inspect("--data", data([{"messages": TALK}]), "--model", models / "sft", "--max_length", most) == 2
    said = capsys.readouterr().out
    found = printed_row(said, "row 0")
    assert [place for place, (role, *_) in enumerate(found) if role == "cut"] == list(range(most, len(found)))
    assert f"row 0: {len(found)} tokens, " in said and f", cut after {most}" in said
    assert not any(marked for *_, marked in found[most:]) and any(marked for *_, marked in found[:most])
    assert f"1 row, {most} tokens" in said and f"1 row cut at {most}" in said


def test_the_same_text_under_another_tokenizer(models, tokenizer, base_tokenizer, data, capsys):
    assert (
        inspect("--data", data([{"messages": TALK}]), "--model", models / "sft", "--against", models / "pretrain") == 0
    )
    said = capsys.readouterr().out
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    ids = base_tokenizer(text, add_special_tokens=False)["input_ids"]
    block = said[said.index(f"row 0 under {models / 'pretrain'}: {len(ids)} tokens") :].split("\n\n")[0].splitlines()
    assert [int(id) for line in block[2::2] for id in line.split()] == ids


# ---- the terminal ---------------------------------------------------------------------------------------------------


def test_colours_say_the_same_and_only_where_they_are_wanted(models, data, capsys, monkeypatch):
    words = ("--data", data([{"messages": TALK}]), "--model", models / "sft")
    inspect(*words)
    without = capsys.readouterr().out
    monkeypatch.setattr(xray_text, "wants_colour", lambda: True)
    inspect(*words)
    with_colour = capsys.readouterr().out
    assert "\x1b[" not in without and with_colour.count("\x1b[") > 100
    assert re.sub(r" +\n", "\n", re.sub(r"\x1b\[[0-9;]*m", "", with_colour)) == without


def test_colours_are_for_terminals_that_take_them(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal, open(os.devnull, "w") as file:
        assert xray_text.wants_colour(terminal) and not xray_text.wants_colour(file)
        monkeypatch.setenv("NO_COLOR", "1")
        assert not xray_text.wants_colour(terminal)
        monkeypatch.delenv("NO_COLOR")
        monkeypatch.setenv("TERM", "dumb")
        assert not xray_text.wants_colour(terminal)
    os.close(ours)


def test_content_cannot_move_the_cursor(models, data, capsys):
    rows = [{"messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE}]}]
    inspect("--data", data(rows), "--model", models / "sft", "--max_length", 512, "--against", models / "pretrain")
    said = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in said) and "\\x1b" in said


def test_lines_fit_the_terminal(models, data, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    rows = [{"messages": [{"role": "user", "content": "漢字かな " * 20}, {"role": "assistant", "content": "é " * 50}]}]
    inspect("--data", data(rows), "--model", models / "sft", "--max_length", 900)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(xray_text.width_of, lines[3:])) <= 82  # the verdict's last line is a sentence
    assert max(map(xray_text.width_of, [line for line in lines if line.startswith(" " * 11)])) <= 60
    assert xray_text.width_of("漢a\u0301") == 3


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_page_has_the_same_tokens(models, tokenizer, data, tmp_path, capsys):
    file = tmp_path / "deep" / "page.html"
    words = ("--data", data([{"messages": TALK}]), "--model", models / "sft", "--rows", 1)
    assert inspect(*words, "--html", file) == 0
    assert f"page  {file}" in capsys.readouterr().out and not list(tmp_path.glob("deep/*.part"))
    tokens = [token for token in Page(file).tokens if token["small"]]
    expected = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    row, packed = tokens[: len(expected["input_ids"])], tokens[len(expected["input_ids"]) :]
    assert [int(token["small"]) for token in row] == expected["input_ids"]
    assert [int("m" in token["class"]) for token in row] == expected["assistant_masks"]
    text = "".join(token["b"] for token in row).replace("⏎", "\n")
    assert text == tokenizer.apply_chat_template(TALK, tokenize=False)
    control = set(tokenizer.all_special_ids)
    assert all(("c" in token["class"]) == (int(token["small"]) in control) for token in row)
    assert len(packed) == 256 and {token["small"] for token in packed[len(row) :]} == {str(tokenizer.pad_token_id)}


def test_hostile_rows_stay_text_on_the_page(models, data, tmp_path, capsys):
    talk = [{"role": role, "content": HOSTILE} for role in ("system", "user", "assistant")]
    file = tmp_path / "page.html"
    hostile_name = tmp_path / "<b onclick=x>&'\".jsonl"
    shutil.copy(data([{"messages": talk}]), hostile_name)
    words = ("--model", models / "sft", "--max_length", 1024, "--against", models / "pretrain")
    assert inspect("--data", hostile_name, *words, "--html", file) == 0
    page = Page(file)
    assert set(page.tags) <= {
        "html", "head", "meta", "title", "style", "body", "input", "main", "header", "p", "h1", "h2", "h3", "h4", "ul",
        "li", "b", "span", "small", "a", "section", "label", "article", "div", "svg", "path", "text", "rect", "table",
        "thead", "tbody", "tr", "th", "td", "em", "footer",
    }  # fmt: skip
    assert page.tags.count("style") == 1
    assert not [each for each in page.attributes if each[1].startswith("on") or each[1] in ("src", "srcset", "action")]
    assert {value for _, name, value in page.attributes if name == "href"} == {"#gate"}
    styles = {value for _, name, value in page.attributes if name == "style"}
    assert all(re.fullmatch(r"width:[0-9.]+%", style) for style in styles)
    policy = [
        value for tag, _, value in page.attributes if tag == "meta" and value and value.startswith("default-src")
    ]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    source = file.read_text(encoding="utf-8")
    assert "http" not in re.sub(r"http-equiv", "", re.sub(r"<b>.*?</b>", "", source)) and "49" not in page.text[:200]
    assert "\x1b" not in source and "\u202e" not in source
    assert "{{7*7}}" in "".join(token["b"] for token in page.tokens).replace(" ", "")


def test_the_page_shows_the_refusal(models, data, tmp_path, capsys):
    file = tmp_path / "page.html"
    rows = [{"messages": TALK}] * 3 + [{"messages": TALK[1:2]}]
    words = ("--max_length", 60, "--allow", "truncated", "--html", file)
    assert inspect("--data", data(rows), "--model", models / "sft", *words) == 2
    text = " ".join(Page(file).text.split())
    assert "The stage would refuse to train: 1 of 13 conditions not met" in text and "or --allow no_" in text
    assert "row 3: 0 assistant turns, found roles: user" in text and "truncated allowed" in text


# ---- stages, parents, words -----------------------------------------------------------------------------------------


def test_rankings_show_where_each_reply_is_scored(models, tokenizer, capsys):
    assert tiny_config("reward", models / "sft") == 0
    said = capsys.readouterr().out
    row = next(iter(tiny.rows("rankings", "train", 50, 0)))
    for place, reply in enumerate(row["completions"], 1):
        found = printed_row(said, f"row 0, reply {place}")
        assert [marked for *_, marked in found] == [False] * (len(found) - 1) + [True]
        assert [id for _, _, id, _ in found] == tokenizer.apply_chat_template([*row["prompt"], *reply])["input_ids"]
    assert "ok       score_not_at_end" in said


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_prompts_end_where_the_reply_begins(models, tokenizer, stage, capsys):
    more = {"reward_model_path": models / "sft"} if stage == "ppo" else {}
    assert tiny_config(stage, models / "sft", **more) == 0
    said = capsys.readouterr().out
    kind = re.search(r"tiny \((\w+)\)", said)[1]
    row = next(iter(tiny.rows(kind, "train", 50, 0)))
    found = printed_row(said, "row 0")
    assert [id for _, _, id, _ in found] == tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)[
        "input_ids"
    ]
    closed = len(tokenizer.apply_chat_template(row["prompt"])["input_ids"])
    assert {role for role, *_ in found[closed:]} == {"assistant"}
    assert {role for role, *_ in found[:closed]} <= {"system", "user"} and "ok       packing_leaks" in said


def test_data_says_which_stage_it_is_for(models, data, capsys):
    prompt = [{"role": "user", "content": "hi"}]
    for row, stage in (
        ({"messages": TALK}, "sft"),
        ({"prompt": prompt, "chosen": TALK[2:3], "rejected": TALK[4:]}, "reward"),
        ({"prompt": prompt, "answer": "5"}, "grpo"),
    ):
        assert inspect("--data", data([row]), "--model", models / "sft", "--max_rows", 1) == 0
        assert capsys.readouterr().out.startswith(f"{stage}: ")
    with pytest.raises(UserError, match="rows have the columns text; expected messages, or prompt"):
        inspect("--data", data([{"text": "once"}]), "--model", models / "sft")


def test_a_stream_shows_its_first_buffer(models, data, capsys):
    file = data([{"messages": [{**TALK[1], "content": f"{i}?"}, TALK[2]]} for i in range(9)])
    words = ("--dedup", "none", "--streaming", "true", "--stream_buffer", 4)
    assert inspect("--data", file, "--model", models / "sft", *words) == 0
    assert "\n4 rows, " in capsys.readouterr().out


def test_a_tokenizer_alone_is_enough_for_what_it_can_tell(models, data, capsys):
    assert inspect("--data", data([{"messages": TALK}]), "--model", models / "words") == 0
    said = capsys.readouterr().out
    assert "not checked: packing and the generation config" in said and "packing_leaks" not in said


def test_a_template_of_ones_own(models, data, capsys):
    words = ("--data", data([{"messages": TALK}]), "--model", models / "pretrain")
    assert inspect(*words, "--template", REPOSITORY / "chat_templates/chatml_plain.jinja") == 0
    assert [token for _, token, *_ in printed_row(capsys.readouterr().out, "row 0")][:1] == ["<|im_start|>"]
    with pytest.raises(UserError, match="no chat template"):
        inspect(*words)


def test_a_parent_that_is_not_there_yet(tmp_path, monkeypatch):
    """The chain is copied, so that nobody's runs/tiny stands in for it."""
    shutil.copytree(REPOSITORY / "recipes", tmp_path / "recipes")
    shutil.copytree(REPOSITORY / "chat_templates", tmp_path / "chat_templates")
    monkeypatch.chdir(tmp_path)
    words = r"policy: runs/tiny/sft is not there yet: stage sft of recipes/tiny writes it; run it: "
    chain = " && ".join(f"posttrain run recipes/tiny --only {name}" for name in ("tokenizer", "pretrain", "sft"))
    with pytest.raises(UserError, match=words + chain):
        inspect("--config", "recipes/tiny/grpo.yaml")
    with pytest.raises(UserError, match=r"policy: no folder '\./elsewhere/x'"):
        inspect("--config", "recipes/tiny/grpo.yaml", "--model_name_or_path", "./elsewhere/x")


def test_a_config_under_another_name(models, tmp_path, capsys):
    mine = tmp_path / "mine.yaml"
    shutil.copy(REPOSITORY / "recipes/tiny/sft.yaml", mine)
    words = ("--config", mine, "--model_name_or_path", models / "pretrain", "--max_rows", 20)
    with pytest.raises(UserError, match="'mine' is no stage with a gate; expected --stage sft, reward, ppo, grpo"):
        inspect(*words)
    assert inspect(*words, "--stage", "sft") == 0
    capsys.readouterr()
    for config, message in (
        (tmp_path / "no.yaml", "no file"),
        (REPOSITORY / "recipes/tiny/pretrain.yaml", "no stage"),
    ):
        with pytest.raises(UserError, match=message):
            inspect("--config", config)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected --config FILE, or --data PATH with --model PATH"),
        (["--data", "x"], "expected --config FILE"),
        (["--config", "x", "--data", "y", "--model", "z"], "expected --config FILE"),
        (["--config", "x", "--template", "y"], "--template: goes with --data"),
        (["--config", str(REPOSITORY / "recipes/tiny/sft.yaml"), "--max_row", "3"], "unknown key 'max_row'"),
    ],
)
def test_words_that_do_not_go_together(words, message):
    with pytest.raises(UserError, match=message):
        inspect(*words)


def test_other_verbs_still_refuse_unknown_flags(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.command(["report", "runs/x", "--rows", "3"])
    assert stopped.value.code == 2 and "unrecognized arguments: --rows 3" in capsys.readouterr().err


def test_token_texts_put_together_are_the_text(tokenizer):
    read, text = token_reader(tokenizer), " é 漢\n\tx 👍<|im_end|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    raw = "".join(map(read, ids)).encode("latin-1", errors="backslashreplace").decode("latin-1")
    whole = re.sub(r"(?:\\x[0-9a-f]{2})+", lambda m: bytes.fromhex(m[0].replace("\\x", "")).decode(), raw)
    assert whole == text.replace("é", "é") and read(tokenizer.eos_token_id) == "<|im_end|>"
