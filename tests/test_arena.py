"""The arena, in a real Chromium: what a labeller does on the page, and what stands in the files after each act.

Run: pytest tests/test_arena.py
"""

import json
import time

import pytest
from board_helpers import Board, reciter
from browser import chromium, open_page

from posttrain.board import app, arena, rank_cards
from posttrain.board.stages import Pool, Settings, find
from posttrain.board.votes import Item, Votes
from posttrain.data import DataConfig
from posttrain.errors import UserError

QUESTION = "What is 2+2?"
HOSTILE = '<img src=x onerror="document.title=1"> [a](javascript:alert(1)) ![b](/etc/passwd) ${document.title=2} {{x}}'
SAID = {"right": "The answer is 4.", "wrong": "The answer is 5.", "hostile": HOSTILE}


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("arena")
    return [reciter(root / name, tokenizer, QUESTION, reply) for name, reply in SAID.items()]


@pytest.fixture(scope="module")
def votes(tmp_path_factory):
    return Votes(tmp_path_factory.mktemp("run") / "votes")


@pytest.fixture(scope="module")
def board(models, votes):
    prompts = arena.Prompts([{"prompt": arena.typed(QUESTION)}], "questions, test", votes)
    running = Board(models, build=lambda *page: app.build(*page, votes, prompts))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@pytest.fixture
def page(browser, board):
    found = enter(browser, board)
    yield found
    assert found.faults == [] and found.outside == [] and "board" in found.title()
    found.context.close()


def enter(browser, board, **look):
    page = open_page(browser, **look)
    page.goto(board.url)
    open_arena(page)
    return page


def open_arena(page) -> None:
    """On a phone the tab is behind the button for more."""
    tab = page.get_by_role("tab", name="Arena").first
    page.get_by_role("tab", name="Chat").first.wait_for()
    if not tab.is_visible():
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown").get_by_text("Arena").click()
    else:
        tab.click()


def ask(page) -> dict[str, str]:
    """Ask the question; label of each model by what it said."""
    page.locator("#arena-prompt textarea").fill(QUESTION)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator(".rank-card").nth(2).wait_for()
    texts = {card.get_attribute("data-label"): card.inner_text() for card in page.locator(".rank-card").all()}
    assert "".join(sorted(texts)) == "ABC" and page.locator(".rank-who").count() == 0
    by_start = {"The answer is 4": "right", "The answer is 5": "wrong", "<img": "hostile"}
    return {model: label for start, model in by_start.items() for label, text in texts.items() if start in text}


def number(page, label: str, place: int) -> None:
    page.get_by_label(f"reply {label}: place {place}").click()


def order(page) -> str:
    return page.locator(".rank-state").inner_text()


def drag(page, label: str, onto: str, below: bool) -> None:
    """Take a card by its handle and drop it above or below the middle of another."""
    handle = page.locator(f'.rank-card[data-label="{label}"] .rank-handle')
    handle.scroll_into_view_if_needed()
    start, end = (page.locator(f'.rank-card[data-label="{name}"]').bounding_box() for name in (label, onto))
    page.mouse.move(start["x"] + 15, start["y"] + 15)
    page.mouse.down()
    page.mouse.move(start["x"] + 15, end["y"] + end["height"] * (0.9 if below else 0.1), steps=10)
    page.mouse.up()


def drag_by_finger(page, label: str, onto: str) -> None:
    """Touch a card's handle and let go above the middle of another."""
    page.locator(f'.rank-card[data-label="{onto}"]').scroll_into_view_if_needed()
    start, end = (page.locator(f'.rank-card[data-label="{name}"]').bounding_box() for name in (label, onto))
    finger = page.context.new_cdp_session(page)
    for step in range(9):
        y = start["y"] + 15 + (end["y"] + 5 - start["y"] - 15) * step / 8
        at = [{"x": start["x"] + 15, "y": y}]
        finger.send("Input.dispatchTouchEvent", {"type": "touchMove" if step else "touchStart", "touchPoints": at})
    finger.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def press(page, name: str, said: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()
    page.locator("#arena-status", has_text=said).wait_for()


def rows(votes) -> list[dict]:
    return [json.loads(line) for line in (votes.folder / "votes.jsonl").read_text().splitlines()]


def log(votes) -> list[dict]:
    return [json.loads(line) for line in (votes.folder / "votes.log").read_text().splitlines()]


def test_numbers_a_tie_a_comment_and_who_it_was(page, votes):
    label, before = ask(page), len(rows(votes))
    press(page, "Vote", "still without one: A, B, C")
    number(page, label["right"], 1)
    number(page, label["wrong"], 3)
    assert order(page) == f"No place yet: {label['hostile']}" and len(rows(votes)) == before
    card = page.locator(f'.rank-card[data-label="{label["hostile"]}"]')
    card.focus()
    card.press("3")
    assert order(page) in {f"{label['right']} > {a} = {b}" for a, b in (sorted([label["wrong"], label["hostile"]]),)}
    page.get_by_label("Comment").fill("two are no answer 🙂")
    page.get_by_label("Your name").fill("Ada")
    press(page, "Vote", "Saved.")
    who = dict(zip([c.get_attribute("data-label") for c in page.locator(".rank-card").all()],
                   page.locator(".rank-who").all_inner_texts(), strict=True))  # fmt: skip
    assert who == {label: model for model, label in label.items()}
    row = rows(votes)[-1]
    assert row["ranks"] == [0, 1, 1] and row["models"][0] == "right" and set(row["models"]) == set(SAID)
    assert (row["comment"], row["labeller"], row["source"]) == ("two are no answer 🙂", "Ada", "typed")
    assert [reply[0]["content"] for reply in row["completions"]] == [SAID[model] for model in row["models"]]
    assert ["ABC"[at] for at in row["shown"]] == [label[model] for model in row["models"]]
    assert row["prompt"] == [{"role": "user", "content": QUESTION}] and 0 < row["seconds"] < 300
    page.get_by_label("reply A: place 2").click(force=True)  # all is decided: nothing moves any more
    press(page, "Undo my last vote", "taken back")
    assert row["id"] not in {row["id"] for row in rows(votes)} and log(votes)[-1]["cancels"] == row["id"]


def test_drag_joins_ties_and_keys_move_a_card(page, votes):
    label = ask(page)
    drag(page, "C", "A", below=False)
    assert order(page) == "C > A > B"
    drag(page, "C", "B", below=True)
    assert order(page) == "A > B > C"
    number(page, "B", 1)
    assert order(page) == "A = B > C"
    drag(page, "C", "B", below=False)  # between two that are tied
    assert order(page) == "A = C = B"
    page.locator('.rank-card[data-label="B"]').focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    assert order(page) == "B > A = C"
    press(page, "Vote", "Saved.")
    of = {label: model for model, label in label.items()}
    assert rows(votes)[-1]["models"] == [of["B"], *(of[name] for name in "AC")] and rows(votes)[-1]["ranks"] == [
        0,
        1,
        1,
    ]


def test_a_skip_has_its_reason_and_is_not_learned_from(page, votes):
    ask(page)
    before = rows(votes)
    page.get_by_label("If you skip: why").click()
    page.get_by_role("option", name="The prompt makes no sense").click()
    press(page, "Skip", "Skipped.")
    assert (log(votes)[-1]["event"], log(votes)[-1]["reason"]) == ("skip", "The prompt makes no sense")
    assert rows(votes) == before and page.locator(".rank-card").count() == 0


def test_a_reply_that_attacks_the_page_is_text(page):
    label = ask(page)
    card = page.locator(f'.rank-card[data-label="{label["hostile"]}"] .rank-text')
    assert card.inner_text() == HOSTILE
    assert page.locator("#arena-cards :is(img, a, script)").count() == 0


def test_reload_in_the_middle_loses_nothing_that_was_voted(page, votes):
    before = log(votes)
    ask(page)
    number(page, "A", 1)
    page.reload()
    open_arena(page)
    page.locator("#arena-status", has_text="in " + str(votes.folder)).wait_for()
    assert page.locator(".rank-card").count() == 0 and log(votes) == before
    page.get_by_role("button", name="Draw a prompt").click()
    page.locator(".rank-card").nth(2).wait_for()
    for place, label in enumerate("BAC", 1):
        number(page, label, place)
    page.get_by_role("button", name="Vote", exact=True).dblclick()
    page.locator(".rank-who").first.wait_for()
    time.sleep(0.3)
    assert len(log(votes)) == len(before) + 1 and rows(votes)[-1]["source"] == "questions, test"
    assert rows(votes)[-1]["shown"] == [1, 0, 2]


def test_two_labellers_at_once_one_of_them_on_a_phone(browser, board, page, votes):
    other = enter(browser, board, width=390, dark=True)
    labels = {name: ask(each) for name, each in (("Ada", page), ("Bo", other))}
    for name, each in (("Ada", page), ("Bo", other)):
        for place, model in enumerate(SAID if name == "Ada" else reversed(SAID), 1):
            number(each, labels[name][model], place)
        each.get_by_label("Your name").fill(name)
    assert other.evaluate("document.documentElement.scrollWidth") <= 390
    drag_by_finger(other, labels["Bo"]["right"], labels["Bo"]["hostile"])
    press(page, "Vote", "Saved.")
    press(other, "Vote", "Saved.")
    assert [(row["labeller"], row["models"]) for row in rows(votes)[-2:]] == [
        ("Ada", ["right", "wrong", "hostile"]), ("Bo", ["right", "hostile", "wrong"]),
    ]  # fmt: skip
    other.get_by_role("button", name="Ratings").click()
    other.get_by_role("button", name="Count the votes").click()
    other.locator(".ratings table").nth(1).wait_for()
    assert other.locator(".ratings tr").first.inner_text().split()[:2] == ["stage", "rating"]
    assert other.evaluate("document.documentElement.scrollWidth") <= 390 and other.faults == []
    other.context.close()


def test_the_browser_is_told_no_names_before_the_vote():
    item = Item(arena.typed(QUESTION), [("secret-a", "yes"), ("secret-b", "\x1b[2J")])
    assert "secret" not in json.dumps(rank_cards.cards(item)) and "\x1b" not in str(rank_cards.cards(item))
    assert "secret-a" in json.dumps(rank_cards.cards(item, [1, 2], reveal=True))


def test_who_is_asked_and_in_what_order(models):
    pool = Pool(find(models))
    ask = arena.ask(pool, ["right", "wrong"], 2, arena.typed(QUESTION), Settings(seed=5), "typed")
    *_, item = ask
    assert dict(item.shown) == {name: SAID[name] for name in ("right", "wrong")}
    orders = {tuple(arena.line_up(["a", "b", "c"], 3, arena.random.Random(seed))) for seed in range(50)}
    assert len(orders) == 6  # every order comes up
    assert arena.line_up(["a"], 3, arena.random.Random(0)) == ["a"] * 3
    *_, samples = arena.ask(pool, ["right"], 2, arena.typed(QUESTION), Settings(seed=5), "typed")
    assert samples.shown == [("right", SAID["right"])] * 2 and samples.settings["models"]["right"]["path"] == models[0]
    for names, num, words in (
        ([], 2, "no stage"),
        (["right"], 1, "2 to 8"),
        (["right"], 2.5, "2 to 8"),
        (["?"], 2, "called"),
    ):
        with pytest.raises(UserError, match=words):
            list(arena.ask(pool, names, num, arena.typed(QUESTION), Settings(), "typed"))


def test_prompts_come_least_voted_first(tmp_path):
    votes = Votes(tmp_path)
    rows = [{"prompt": arena.typed(f"{number}?")} for number in range(5)]
    for number in (0, 3):
        votes.vote(Item(rows[number]["prompt"], [("a", "x"), ("b", "y")]), [0, 1])
    prompts = arena.Prompts(rows, "source", votes)
    drawn = [prompts.draw()[0]["content"] for _ in range(8)]
    assert set(drawn[:3]) == {"1?", "2?", "4?"} and sorted(drawn[3:]) == ["0?", "1?", "2?", "3?", "4?"]
    held_out = arena.load_prompts(DataConfig("tiny", "prompts", max_rows=3), "test", 0, votes)
    assert len(held_out.rows) == 3 and held_out.source == "tiny (prompts), test"


@pytest.mark.parametrize("text", ["", " \n", "a\0b", "x" * 30_000])
def test_prompts_that_no_stage_could_learn_from_are_refused(text):
    with pytest.raises(UserError, match="the prompt"):
        arena.typed(text)
    assert arena.typed("half \ud800")[0]["content"] == "half ?"
