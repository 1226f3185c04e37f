"""Pictures of board and report for the README, made again from any run.

In: the folder of a run with a chat model and a report. Out: chat.png, side_by_side.png, xray.png, arena.png and
report.png in a folder, light, 1280 wide.
Run: python tests/screenshots.py runs/tiny .github/images
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import browser

ROOT = Path(__file__).parents[1]
QUESTION = "What is 34+25?"


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    run, out = sys.argv[1], Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "posttrain.cli", "board", run, "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            found = next(filter(None, (re.search(r"http://\S+", line) for line in process.stdout)))
            with browser.page(height=1000) as page:
                page.set_default_timeout(120_000)  # the first reply waits for the model to load
                page.goto(found[0])
                for name, room in (("chat", chat), ("side_by_side", side_by_side), ("xray", xray), ("arena", arena)):
                    room(page)
                    page.mouse.move(0, 0)
                    page.wait_for_timeout(500)
                    page.screenshot(path=out / f"{name}.png", full_page=True)
                    print(out / f"{name}.png")
                page.goto((Path(run) / "report.html").absolute().as_uri())
                page.screenshot(path=out / "report.png")
                print(out / "report.png")
        finally:
            process.terminate()


def fill(page, label: str, text: str) -> None:
    page.get_by_label(label, exact=label != "Seed").locator("visible=true").last.fill(text)  # Seed's says more


def whole(page, number: int) -> None:
    """Waits for so many replies that are finished."""
    page.wait_for_function(
        "n => { const all = document.querySelectorAll('.message.assistant, .message.completion');"
        " return all.length >= n && ![...all].some(each => each.ariaBusy || !each.querySelector('.note')) }",
        arg=number,
    )


def chat(page) -> None:
    fill(page, "Seed", "1")
    page.get_by_label("Show tokens").check()
    for number, text in enumerate(("Hi, who are you?", QUESTION), start=1):
        fill(page, "Message", text)
        page.get_by_role("button", name="Send", exact=True).click()
        whole(page, number)
    page.locator(".tokens").filter(has_text="Reply").locator(".t[data-more*=rank]").first.wait_for()


def side_by_side(page) -> None:
    page.get_by_role("tab", name="Side by side").click()
    fill(page, "Seed", "1")
    fill(page, "Prompt", QUESTION)
    page.get_by_role("button", name="Ask all").click()
    page.locator(".beside").wait_for()
    whole(page, 4)


def xray(page) -> None:
    page.get_by_role("tab", name="Token X-ray").click()
    page.get_by_label("Conversation", exact=True).check()
    for label, text in (("1. system", "Be kind."), ("2. user", QUESTION), ("3. assistant", "The answer is 59.")):
        fill(page, label, text)
    page.get_by_role("button", name="Show tokens").click()
    page.locator(".turn.assistant .t.m").first.wait_for()


def arena(page) -> None:
    page.get_by_role("tab", name="Arena").click()
    page.get_by_text("How to rank").click()  # folds the instructions
    fill(page, "Prompt", QUESTION)
    page.get_by_role("button", name="Ask", exact=True).click()
    page.locator(".rank-text").nth(2).wait_for()
    page.wait_for_timeout(3000)  # for the last replies


if __name__ == "__main__":
    main()
