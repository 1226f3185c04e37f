"""A real headless Chromium for tests that look at pages as users do.

In: a Chromium of the system's or of `playwright install chromium`. Out: a playwright page whose every request is
recorded and which reaches nothing but 127.0.0.1 and files. Without a Chromium the test is skipped, saying so.

    with browser.page(width=390, dark=True) as page:
        page.goto("http://127.0.0.1:7860")
        page.screenshot(path="board.png")
    assert not page.outside          # addresses beyond this machine that the page asked for
"""

import contextlib
import os
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
# No look-ups of its own makers' hosts at start; any name but this machine's is not found, as with the network closed.
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-sync",
    "--disable-component-update", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]  # fmt: skip


def _launch(playwright):
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        path = playwright.chromium.executable_path
        if not os.path.exists(path):
            pytest.skip("no Chromium here: apt-get install chromium, or playwright install chromium")
    return playwright.chromium.launch(executable_path=path, args=FLAGS)


@contextlib.contextmanager
def chromium():
    """A running browser (playwright's `Browser`)."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        found = _launch(playwright)
        try:
            yield found
        finally:
            found.close()


def open_page(running, *, width: int = 1280, height: int = 900, dark: bool = False):
    """A page of its own context (cookies, storage): two of them are two users. `page.outside` lists the requests that
    left this machine, `page.faults` the errors of its scripts."""
    context = running.new_context(
        viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
    )
    page = context.new_page()
    page.set_default_timeout(90_000)  # other tests keep the machine busy
    page.outside, page.faults = [], []
    local = ("http://127.0.0.1", "ws://127.0.0.1", "file:", "data:", "blob:", "about:")
    page.on("request", lambda request: request.url.startswith(local) or page.outside.append(request.url))
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    return page


@contextlib.contextmanager
def page(**look):
    """One page of a browser of its own."""
    with chromium() as running:
        yield open_page(running, **look)
