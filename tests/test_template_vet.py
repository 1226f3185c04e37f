"""Templates that attack: each ends in an error within about a second, in a process of its own or stopped in ours.

Run: pytest tests/test_template_vet.py
"""

import signal
import threading
import time
from copy import deepcopy

import pytest
from template_helpers import NAMES, source

from posttrain.chat import encode_chat, set_template
from posttrain.errors import UserError
from posttrain.template_render import TooSlow, render, time_limit
from posttrain.template_vet import vet

pytestmark = pytest.mark.timeout(60)
HELLO = [{"role": "user", "content": "hello"}]

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLE = "{% set n = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"
BRANCH = "{% macro f(n) %}{{ f(n - 1) if n else '' }}{{ f(n - 1) if n else '' }}{% endmacro %}{{ f(60) }}"
SPINS = "did not end within 0.5 s of CPU time"
HOSTILE = {
    "nested loops": (LOOP, SPINS),
    "nested loops without output": ("{% set x %}" + LOOP + "{% endset %}", SPINS),
    "a range that is too long": (
        "{% for a in range(10 ** 9) %}{% endfor %}",
        r"raises to a power|too much memory or steps",
    ),
    "a long range in one number": ("{% for a in range(900000) %}{% endfor %}", "Range too big"),
    "a text of ten to the ninth": ("{{ 'x' * 1000000000 }}", "has the number 1000000000"),
    "the same, folded away by the compiler": ("{{ 'x' * (99999 * 99999) }}", "memory|ended the process"),
    "a padded text": ("{{ 'x' | center(1000000000) }}", "has the number 1000000000"),
    "a text that doubles": (DOUBLE, "memory|did not end"),
    "two million characters": ("{{ 'xx' * 1000000 }}", "it writes 2000000 characters"),
    "a tower of powers": ("{{ 9 ** 9 ** 9 ** 9 }}", r"raises to a power"),
    "a macro that calls itself twice": (BRANCH, SPINS),
    "a macro that never returns": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "too much memory or steps"),
    "a class": ("{{ ''.__class__ }}", "attribute '__class__', which is Python's own"),
    "a class by item": ("{{ ''['__class__'] }}", "attribute '__class__'"),
    "a class by filter": ("{{ '' | attr('__class__') }}", "the sandbox stopped it: attribute '__class__'"),
    "a class by a name put together": ("{{ '' | attr('__cla' ~ 'ss__') }}", "the sandbox stopped it"),
    "globals of a function": ("{{ raise_exception.__globals__ }}", "__globals__"),
    "globals of a macro": ("{{ cycler.__init__.__globals__.os }}", "__"),
    "only with tools": ("{% if tools %}" + LOOP + "{% endif %}", SPINS),
    "only at generation": ("{% if add_generation_prompt %}" + LOOP + "{% endif %}", SPINS),
    "only after many turns": ("{% if messages | length > 30 %}" + LOOP + "{% endif %}", SPINS),
    "a change to the messages": ("{{ messages.append(1) }}", "the sandbox stopped it"),
    "no Jinja": ("{% for m in messages %}", "line 1 is no Jinja: Unexpected end of template"),
    "thousands of brackets": ("{{ " + "(" * 20000 + ")" * 20000 + " }}", "cannot even be compiled|is no Jinja|ended"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_an_error(tokenizer, name):
    template, words = HOSTILE[name]
    mine = deepcopy(tokenizer)
    mine.chat_template = template
    before = time.process_time()
    with pytest.raises(UserError, match=rf"is not safe to render: .*({words})"):
        encode_chat(mine, HELLO)
    assert time.process_time() - before < 1  # it never ran in this process


def test_a_hostile_template_is_not_set(tokenizer, tmp_path):
    path = tmp_path / "hostile.jinja"
    path.write_text(LOOP)
    with pytest.raises(UserError, match="is not safe to render"):
        set_template(deepcopy(tokenizer), None, str(path))


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_templates_pass(name):
    vet(source(name))


def test_the_templates_in_trls_package_pass():
    """No false alarm on what models really ship."""
    from importlib.util import find_spec
    from pathlib import Path

    from posttrain.template_vet import trial

    found = sorted((Path(find_spec("trl").origin).parent / "chat_templates").glob("*.jinja"))[::4]
    assert len(found) > 10
    assert {path.stem: trial(path.read_text(encoding="utf-8")) for path in found} == dict.fromkeys(
        (path.stem for path in found), None
    )


WAITS = "{% if messages[0].content == 'now' %}" + LOOP + "{% endif %}<|im_start|>"


def test_one_that_waits_for_a_text_is_stopped_when_it_loops(tokenizer):
    mine = deepcopy(tokenizer)
    mine.chat_template = WAITS
    assert encode_chat(mine, HELLO).input_ids == tokenizer.convert_tokens_to_ids(["<|im_start|>"])
    before = signal.getsignal(signal.SIGVTALRM)
    with pytest.raises(UserError, match="roles user: it did not end within 0.8 s"):
        encode_chat(mine, [{"role": "user", "content": "now"}])
    assert signal.getsignal(signal.SIGVTALRM) == before and signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    assert encode_chat(mine, HELLO).input_ids  # the next render works


def test_one_that_fails_on_a_text_is_a_users_error(tokenizer):
    """Whatever Python raises inside a template."""
    for expression in ("1 // 0", "messages[0].content + 1", "messages[0].nothing.at.all"):
        mine = deepcopy(tokenizer)
        mine.chat_template = f"{{% if messages[0].content == 'now' %}}{{{{ {expression} }}}}{{% endif %}}"
        assert encode_chat(mine, HELLO).input_ids == []
        with pytest.raises(UserError, match="the chat template refuses messages with roles user: ."):
            encode_chat(mine, [{"role": "user", "content": "now"}])


def test_the_limit_counts_the_threads_own_time_and_stays_out_of_other_threads():
    with pytest.raises(TooSlow), time_limit(0.05):
        while True:
            pass
    others = [threading.Thread(target=lambda: sum(range(3_000_000))) for _ in range(2)]
    with time_limit(0.05):  # theirs is not ours
        for thread in others:
            thread.start()
        for thread in others:
            thread.join()
    found = []
    thread = threading.Thread(target=lambda: found.append(render(source("chatml"), HELLO)[0]))
    thread.start()
    thread.join()
    assert found == ["<|im_start|>user<|im_sep|>hello<|im_end|>"]
