"""`posttrain chat` and the board with tools, on models that recite conversations with calls; tools' text stays text.

Run: pytest tests/test_chat_tools.py
"""

import signal
import threading
import time
from copy import deepcopy
from types import SimpleNamespace

import browser
import pytest
from board_helpers import Board, reciter
from template_helpers import source

from posttrain import suites
from posttrain.board.chat_room import Talk, written
from posttrain.board.stages import Pool, Settings, find
from posttrain.chat import encode_chat, set_template
from posttrain.errors import UserError
from posttrain.reply import whole
from posttrain.serve import Session, chat, load
from posttrain.suite_settings import Target
from posttrain.tool_calls import ToolLimits
from posttrain.tools import flags, load_tools, schemas

HOSTILE = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script> \u202eegap\x1b[2J <|im_end|>"
TALKING_TOOLS = f'''
import time

def say(what: str) -> str:
    """
    Says something.

    Args:
        what: Anything.
    """
    if what == "sleep":
        time.sleep(60)
    return {HOSTILE!r}
'''


def call(name: str, **arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def talk(question: str, name: str, argument: str, value: str, answer: str, reply: str) -> list[dict]:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call(name, **{argument: value})]},
        {"role": "tool", "name": name, "content": answer},
        {"role": "assistant", "content": reply},
    ]


SUM = talk("6*7?", "calculator", "expression", "6*7", "42", "It is 42.")
SAYS = talk("Speak", "say", "what", "it", HOSTILE, "Said.")
SLEEPS = talk("Sleep", "say", "what", "sleep", "never", "Slept.")


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    (folder / "talking_tools.py").write_text(TALKING_TOOLS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        return load_tools(["calculator", "talking_tools.say"])


@pytest.fixture(scope="module")
def models(tokenizer, model, tools, tmp_path_factory):
    """name -> folder: each recites one conversation in chatml_calls; `hermes` the sum in chatml_tools."""
    root, found = tmp_path_factory.mktemp("models"), {}
    for name, said, format in [
        ("sum", SUM, "chatml_calls"),
        ("says", SAYS, "chatml_calls"),
        ("sleeps", SLEEPS, "chatml_calls"),
        ("hermes", SUM, "chatml_tools"),
    ]:
        spoken = deepcopy(tokenizer)
        (root / "template.jinja").write_text(source(format))
        set_template(spoken, deepcopy(model), str(root / "template.jinja"))
        found[name] = reciter(root / name, spoken, said, None, 2048, schemas(tools))
    return found


@pytest.mark.parametrize("name", ["sum", "hermes"])
def test_calls_and_answers_are_shown_and_the_reply_is_piped(models, tools, name, capsys):
    assert chat(models[name], prompt="6*7?", temperature=0, max_new_tokens=600, tools=tools) == 0
    out, err = capsys.readouterr()
    assert out == "Let me see.\nIt is 42.\n"
    assert err == "[calculator(expression='6*7')]\n[-> 42]\n"


def test_a_conversation_goes_on_from_what_was_called(models, tools):
    session = Session(*load(models["sum"]), 0, 1, 200, 0)
    session.set_tools(tools)
    session.turn("6*7?")
    assert session.messages == SUM
    expected = [*SUM, {"role": "user", "content": "And?"}]
    ids = encode_chat(session.tokenizer, expected, add_generation_prompt=True, tools=schemas(tools)).input_ids
    assert session.encode("And?") == ids
    session.context = len(session.encode("And?"))  # no room left for the whole: the oldest four messages go
    ids, said = session.fit("And?")
    assert "the oldest 1 turn(s) were dropped" in said and session.messages == [] and len(ids) < session.context


def test_what_a_tool_says_cannot_move_the_terminal(models, tools, capsys):
    chat(models["says"], prompt="Speak", temperature=0, tools=tools)
    out, err = capsys.readouterr()
    assert "\x1b" not in err and "\u202e" not in err and "\\x1b[2J <|im_end|>]" in err and out.endswith("Said.\n")


def test_limits_are_kept(models, tools, capsys):
    call_ids = 12
    chat(models["sum"], prompt="6*7?", temperature=0, tools=tools, limits=ToolLimits(max_tool_tokens=1))
    assert "[-> 4 ... (cut)]" in capsys.readouterr().err
    chat(models["sum"], prompt="6*7?", temperature=0, max_new_tokens=call_ids + 12, tools=tools)
    out, err = capsys.readouterr()
    assert "[-> 42]" in err and f"[cut at max_new_tokens {call_ids + 12}]" in err and "42" not in out
    chat(models["sleeps"], prompt="Sleep", temperature=0, tools=tools, limits=ToolLimits(tool_timeout=0.2))
    assert "[-> error: say gave no answer within 0.2 s]" in capsys.readouterr().err


def test_ctrl_c_while_a_tool_runs_keeps_the_conversation(models, tools):
    session = Session(*load(models["sleeps"]), 0, 1, 200, 0)
    session.set_tools(tools)
    main = threading.main_thread().ident
    ctrl_c = threading.Timer(1.0, lambda: signal.pthread_kill(main, signal.SIGINT))
    ctrl_c.start()
    start = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            session.turn("Sleep")
    finally:
        ctrl_c.cancel()  # a turn that ends early must not end pytest
    assert time.monotonic() - start < 20
    assert session.messages == [
        {"role": "user", "content": "Sleep"},
        {"role": "assistant", "content": "Let me see."},
    ]
    session.encode("And?")


def test_a_reply_that_breaks_off_is_its_words():
    assert whole(SUM[1:]) == SUM[1:] and whole([]) == []
    assert whole(SUM[1:3]) == [{"role": "assistant", "content": "Let me see."}]
    assert whole([{**SUM[1], "content": ""}, SUM[2]]) == []


def test_models_that_cannot_call_are_told_so(small_chain, tools):
    with pytest.raises(UserError, match="chat template cannot write tool calls.*chatml_calls.jinja"):
        chat(str(small_chain / "sft"), prompt="x", tools=tools)
    with pytest.raises(UserError, match="no chat template, so it cannot call any"):
        chat(str(small_chain / "pretrain"), prompt="x", tools=tools)


def test_flags():
    def given(**flags):
        return SimpleNamespace(
            **{"tools": None, "tool_options": None, **vars(ToolLimits()), **flags},
        )

    found, limits = flags.loaded(given(tools=["calculator"], max_tool_calls=2))
    assert [tool.name for tool in found] == ["calculator"] and limits == ToolLimits(2)
    assert flags.options_of(given(tools=["search"], tool_options='{"search": {"folder": "d"}}'))["search"]
    for wrong, message in [
        ({"tool_options": "[1]", "tools": ["search"]}, "found '.1.', expected a mapping"),
        ({"tool_options": "{", "tools": ["search"]}, "is no JSON or YAML"),
        ({"tool_options": "{search: {}}"}, "given without --tools"),
    ]:
        with pytest.raises(UserError, match=f"--tool_options: .*{message}"):
            flags.options_of(given(**wrong))


# ---- the board ------------------------------------------------------------------------------------------------------

HOW = ("", 0.0, 1.0, 0, 200, "1")  # system message, temperature, top-p, top-k, most new tokens, seed


def test_the_boards_pieces_hold_calls_and_answers(models, tools):
    pool = Pool(find([models["sum"]]), tools=tools)
    pieces = list(pool.stream("sum", "6*7?", Settings(temperature=0), tools=True))
    assert pieces[-1].said == SUM[1:] and pieces[-1].ended and pieces[-1].note == ""
    assert [piece.running for piece in pieces if piece.running] == ["calculator(expression='6*7')"]
    whole_talk, prompt = encode_chat(pool.tokenizer("sum"), SUM, tools=schemas(tools)), pieces[-1].prompt_ids
    tokens = pieces[-1].tokens
    assert prompt + [token.id for token in tokens] == whole_talk.input_ids
    assert [int(token.probability is not None) for token in tokens] == whole_talk.assistant_mask[len(prompt) :]
    without = list(pool.stream("sum", "6*7?", Settings(temperature=0, max_new_tokens=4)))
    assert without[-1].prompt_ids != pieces[-1].prompt_ids


def test_a_conversation_of_the_room(models, small_chain, tools):
    pool = Pool(find([models["sum"], str(small_chain / "sft")]), tools=tools)
    talk = Talk()
    *_, (shown, _, _) = written(pool, talk, "sum", "6*7?", False, HOW)
    assert '<summary>calculator(expression=&#39;6*7&#39;)</summary><pre dir="auto">42</pre>' in shown
    *_, (_, _, tokens) = written(pool, talk, "sum", "And?", True, HOW)
    assert tokens.index("turn user") < tokens.index("turn tool") < tokens.index("Reply")
    assert talk.turns[-1].read == [*SUM, {"role": "user", "content": "And?"}]
    list(written(pool, Talk(turns := []), "sft", "Hello", False, (*HOW[:4], 4, "1")))
    assert "its chat template has no tools" in turns[-1].remark


@pytest.mark.slow
def test_the_page_folds_calls_and_a_hostile_answer_is_inert(models, tools):
    running = Board([models["says"], models["sum"]], tools=tools)
    try:
        with browser.page() as opened:
            opened.goto(running.url)
            opened.get_by_text("stages whose chat template has tools may call calculator, say").first.wait_for()
            opened.locator("input[aria-label*='Temperature'] >> visible=true").first.fill("0")
            opened.get_by_label("Stage", exact=True).first.click()
            opened.get_by_role("option", name="says", exact=True).click()
            opened.get_by_label("Message", exact=True).fill("Speak")
            opened.get_by_role("button", name="Send", exact=True).click()
            opened.get_by_text("Said.").wait_for()
            block = opened.locator("details.call")
            assert not block.locator("pre").is_visible()
            block.locator("summary").click()
            assert "<script>window.hacked=1</script>" in block.locator("pre").inner_text()
            assert opened.evaluate("window.hacked") is None and opened.locator(".message img").count() == 0
            assert not opened.outside and not opened.faults
    finally:
        running.stop()


def test_an_evaluation_of_a_run_leaves_out_stages_that_cannot_call(models, small_chain):
    given = SimpleNamespace(tools=["calculator"], tool_options=None)
    able, unable = (Target(name, str(path), {}, None, True) for name, path in
                    [("sum", models["sum"]), ("sft", small_chain / "sft")])  # fmt: skip
    said = "sft: left out, its chat template cannot write calls of the tools"
    assert suites._that_call([able, unable], given) == ([able], [said])
    assert suites._that_call([unable, unable], given) == ([unable, unable], [])
