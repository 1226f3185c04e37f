"""The board's rooms in a real Chromium: chat, side by side, token X-ray; what is written on them stays text.

Run: pytest tests/test_board.py
"""

import re
import time

import browser
import pytest
from board_helpers import board, reciter

from posttrain.serve import printable

HOSTILE = (
    "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script><style>body{display:none}</style>"
    "![a](/etc/passwd)![b](http://evil.example/b.png)[c](javascript:alert(1))<a href='data:text/html,d'>d</a>"
    "$\\href{javascript:e}{e}$ ${window.hacked=1} {{7*7}} <iframe src='//evil.example'></iframe> \u202eegap\x1b[2J\x07"
)


@pytest.fixture(scope="module")
def running(small_chain, tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    hostile = reciter(root / "hostile", tokenizer, "Hello", HOSTILE, 1024)
    with board(small_chain, hostile, reciter(root / "endless", tokenizer, "Hello", None, 2048), keep=6) as running:
        yield running


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as found:
        yield found


@pytest.fixture
def open_board(running, chromium):
    """Opens the board as another user each time; afterwards no page asked for anything elsewhere, or failed."""
    pages = []

    def opened(room: str = "Chat", **look):
        pages.append(browser.open_page(chromium, **look))
        pages[-1].goto(running.url)
        pages[-1].get_by_role("tab", name=room).click()
        return pages[-1]

    yield opened
    for page in pages:
        page.context.close()
    assert [page.outside for page in pages] == [[]] * len(pages)
    assert [page.faults for page in pages] == [[]] * len(pages)


def visible(page, selector):
    return page.locator(f"{selector} >> visible=true")


def most_new_tokens(page, number: int) -> None:
    visible(page, "input[aria-label*='Most new tokens']").first.fill(str(number))


def choose(page, label: str, option: str) -> None:
    visible(page, f'input[aria-label="{label}"]').click()
    page.get_by_role("option", name=option, exact=True).click()


def send(page, text: str, box: str = "Message", button: str = "Send") -> None:
    page.get_by_label(box, exact=True).fill(text)
    page.get_by_role("button", name=button, exact=True).click()


def finished(page, number: int = 1):
    """The last of `number` messages of models, when it is whole."""
    page.wait_for_function(
        "n => { const all = document.querySelectorAll('.message.assistant, .message.completion');"
        " return all.length == n && ![...all].some(each => each.ariaBusy || !each.querySelector('.note')) }",
        arg=number,
    )
    return page.locator(".message.assistant, .message.completion").last


def said(message) -> str:
    return message.locator(".said").text_content()


def test_chat_streams_regenerates_clears_and_shows_what_is_behind(open_board, running):
    page = open_board()
    assert "pretrain → sft → ppo → grpo" in page.locator(".board-head").text_content()
    most_new_tokens(page, 12)
    send(page, "What is 2 + 2?")
    first = finished(page)
    seed = re.search(r"12 tokens in [\d.]+ s, seed (\d+)", first.text_content())[1]
    page.get_by_label("Seed").fill(seed)
    text = said(first)
    page.get_by_role("button", name="Regenerate").click()
    page.wait_for_function("text => document.querySelector('.message.assistant .said')?.textContent == text", arg=text)
    page.get_by_label("Show tokens").check()
    tokens = page.locator(".tokens").filter(has_text="Prompt").locator(".t small")
    tokens.first.wait_for()
    from posttrain.chat import encode_chat

    asked = [{"role": "user", "content": "What is 2 + 2?"}]
    ids = encode_chat(running.pool.tokenizer("grpo"), asked, add_generation_prompt=True).input_ids
    assert [int(each) for each in tokens.all_text_contents()] == ids
    reply = page.locator(".tokens").filter(has_text="Reply").locator(".t")
    assert reply.count() == 12 and "rank" in reply.first.get_attribute("data-more")
    page.get_by_label("Message", exact=True).fill("And now?")
    page.get_by_label("Message", exact=True).press("Enter")
    finished(page, 2)
    page.get_by_role("button", name="Chat template").click()
    page.locator(".source").wait_for()
    assert page.locator(".source").text_content() == running.pool.tokenizer("grpo").chat_template
    page.get_by_role("button", name="Clear").click()
    page.locator("#talk-box .empty").wait_for()


def test_a_base_model_completes_and_a_mistake_is_told(open_board):
    page = open_board()
    choose(page, "Stage", "pretrain (base model)")
    send(page, "Once upon")
    page.get_by_role("button", name="Stop").click()
    reply = finished(page)
    assert said(reply).startswith("Once upon") and "completion" in reply.get_attribute("class")
    page.get_by_label("Seed").fill("seven")
    send(page, "more")
    page.locator(".error").wait_for()
    assert "seed is 'seven'" in page.locator(".error").text_content()
    assert page.get_by_label("Message", exact=True).input_value() == "more"


def test_what_a_model_writes_stays_text_in_every_room(open_board):
    page = open_board()
    choose(page, "Stage", "hostile")
    page.get_by_label("Show tokens").check()
    most_new_tokens(page, 1000)
    send(page, "Hello")
    reply = finished(page)
    page.locator(".tokens").filter(has_text="Reply").wait_for()
    assert said(reply) == printable(HOSTILE)
    page.get_by_role("tab", name="Side by side").click()
    send(page, "Hello", "Prompt", "Ask all")
    page.get_by_role("button", name="Stop all").click()
    beside = page.locator(".beside .message").filter(has=page.locator("h4", has_text="hostile"))
    beside.locator(".note").wait_for()
    page.get_by_role("tab", name="Token X-ray").click()
    page.get_by_label("Text", exact=True).last.fill(HOSTILE)
    page.get_by_role("button", name="Show tokens").click()
    page.locator(".tokens").filter(has_text="bytes a token").wait_for()
    assert page.evaluate("window.hacked") is None
    assert page.locator(".said *:not(em), .cells img, .cells a, .cells script, .cells style, iframe").count() == 0
    assert page.locator("a[href]").count() == 0


def test_stop_and_a_closed_tab_end_the_sampling(open_board, running):
    steps = []
    with running.pool.use("endless") as loaded:
        hook = loaded.model.register_forward_hook(lambda *_: steps.append(1))

    def at_rest():
        limit = time.monotonic() + 20
        while loaded.users and time.monotonic() < limit:
            time.sleep(0.05)
        before = len(steps)
        time.sleep(0.5)
        return not loaded.users and len(steps) == before

    for leave in (lambda page: page.get_by_role("button", name="Stop").click(), lambda page: page.context.close()):
        page = open_board()
        choose(page, "Stage", "endless")
        page.wait_for_function("document.querySelector('input[aria-label=Stage]').value == 'endless'")
        most_new_tokens(page, 4096)
        send(page, "Hello")
        page.wait_for_function("(document.querySelector('.message.assistant .said')?.textContent.length ?? 0) > 20")
        assert loaded.users == 1
        leave(page)
        assert at_rest()
    hook.remove()
    assert len(steps) < 2 * 1900, "neither wrote until its context was full"


def test_two_users_do_not_see_each_other_and_nothing_is_kept(open_board):
    alice, bob = open_board(), open_board()
    for page, text in ((alice, "I am Alice"), (bob, "I am Bob")):
        send(page, text)
    for page in (alice, bob):
        page.get_by_role("button", name="Stop").click()
        finished(page)
    for page, own, other in ((alice, "Alice", "Bob"), (bob, "Bob", "Alice")):
        shown = page.locator("#talk-box").text_content()
        assert f"I am {own}" in shown and f"I am {other}" not in shown
    alice.reload()
    alice.locator("#talk-box .empty").wait_for()
    assert "I am" not in alice.locator("#talk-box").text_content()
    send(bob, "Who am I?")
    bob.get_by_role("button", name="Stop").click()
    finished(bob, 2)


def test_side_by_side_asks_all_stages(open_board, running):
    page = open_board("Side by side")
    most_new_tokens(page, 8)
    visible(page, "label:has-text('Seed') input, label:has-text('Seed') textarea").first.fill("3")
    send(page, "Once upon", "Prompt", "Ask all")
    finished(page, 6)
    from posttrain.board.stages import Settings

    for name in ("pretrain", "sft", "ppo", "grpo"):
        *_, last = running.pool.stream(name, "Once upon", Settings(max_new_tokens=8, seed=3))
        shown = page.locator(".beside .message").filter(has=page.locator("h4", has_text=name))
        assert said(shown) == printable(("Once upon" if name == "pretrain" else "") + last.text)


def test_xray_shows_texts_and_conversations(open_board, running):
    page = open_board("Token X-ray")
    tokenizer = running.pool.tokenizer("grpo")
    choose(page, "Tokenizer and template of", "grpo")
    show = page.get_by_role("button", name="Show tokens")
    page.get_by_label("Text", exact=True).last.fill("A word <|im_end|>\nmore é")
    show.click()
    page.locator(".tokens").wait_for()
    ids = [int(each) for each in page.locator(".cells .t small").all_text_contents()]
    assert tokenizer.decode(ids) == "A word <|im_end|>\nmore é"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids
    page.get_by_label("Probabilities of the stage").check()
    show.click()
    page.locator(".tokens", has_text="-log p").wait_for()
    page.get_by_label("Probabilities of the stage").uncheck()
    page.get_by_label("Conversation", exact=True).check()
    page.get_by_label("2. user").fill("Hi")
    page.get_by_label("3. assistant").fill("Yes")
    show.click()
    page.locator(".turn.assistant .t.m").first.wait_for()
    assert page.locator(".cells .turn h5").all_text_contents() == ["user", "assistant"]
    learned = [int(each) for each in page.locator(".cells .t.m small").all_text_contents()]
    assert tokenizer.decode(learned) == "Yes<|im_end|>"
    page.get_by_label("Messages as JSON").check()
    page.get_by_label("Messages", exact=True).fill('[{"role": "user"')
    show.click()
    page.locator(".error", has_text="not JSON").wait_for()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(open_board, dark):
    page = open_board(width=390, height=800, dark=dark)
    page.get_by_label("Message", exact=True).wait_for()
    for room in ("Chat", "Side by side", "Token X-ray"):
        page.get_by_role("tab", name=room).click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, room
    light = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)")
    assert (sum(light) < 200) is dark
