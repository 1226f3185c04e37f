"""The report in a real Chromium: wide and on a phone, light and dark, on paper; nothing asked of the network.

Run: pytest tests/test_report_browser.py
"""

import json

import pytest
from browser import chromium, open_page
from test_report import HOSTILE, gain, measured, put
from test_report_identity import put_watched
from test_report_parts import put_ppo, write_lines

from posttrain.report import write_report

LONG = "a_name_without_any_place_to_break_it_" * 4
# Of each element with text of its own: its colour against the nearest background behind it (WCAG 2.2, 1.4.3).
CONTRASTS = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgb = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
                          return canvas.getImageData(0, 0, 1, 1).data; };
  const light = colour => [...rgb(colour)].slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => { for (let at = element; at; at = at.parentElement) {
      const found = getComputedStyle(at).backgroundColor; if (rgb(found)[3] > 0) return found; }
    return 'white'; };
  const found = {};
  for (const element of document.querySelectorAll('body *')) {
    if (![...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())) continue;
    if (!element.checkVisibility() || element.tagName === 'title') continue;
    const drawn = element instanceof SVGElement, style = getComputedStyle(element);
    const box = drawn && element.closest('.box');
    const back = box ? getComputedStyle(box.querySelector('rect')).fill
      : behind(drawn ? element.closest('svg') : element);
    const [a, b] = [light(drawn ? style.fill : style.color), light(back)].sort((x, y) => y - x);
    const name = element.tagName + '.' + (element.getAttribute('class') || '');
    found[name] = Math.min(found[name] || 99, (a + 0.05) / (b + 0.05));
  }
  return found;
}"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """(browser, address of a report with all there is to show, and with names and texts that do their worst)."""
    run, other = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("other")
    put(run, "sft", {}, samples=[{"prompt": f"user: {LONG}", "replies": [{"by": LONG, "text": LONG + HOSTILE}]}])
    put(run, "reward", {"policy": "sft"}, gains=[gain(LONG, goal=LONG, unit=LONG)], config={LONG: LONG})
    put_ppo(run, 0.5, data=[{"name": LONG, "skipped": {LONG: 3}, "rows": 5, "sha256": "f" * 64}])
    rows = [{"step": s, "prompt": LONG, "completion": LONG * 9, "reward": 1.0, "rewards": {LONG: 1.0, "b": 0.0},
             "advantage": 0.0, "tokens": 3, "stop": "length"} for s in (1, 9)]  # fmt: skip
    write_lines(run / "ppo" / "rollouts.jsonl", rows)
    (run / "ppo" / "evals").mkdir()
    told = {"metrics": {LONG: measured(1.0, 0.5, unit=LONG)}, "settings": {LONG: LONG}, "samples": []}
    (run / "ppo" / "evals" / "chat.json").write_text(json.dumps(told))
    put_watched(run, "rejection", {"policy": "sft"})
    (run / "grpo").mkdir()
    (run / "grpo" / "log.jsonl").write_text((run / "ppo" / "log.jsonl").read_text())
    put(other, "sft", {}, config={LONG: LONG}, versions={LONG: LONG})
    put(other, "reward", {"policy": "sft"}, versions={LONG: LONG})
    report = write_report(run, against=other, price=2.5)
    with chromium() as running:
        yield running, report.as_uri()


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_page_fits_and_can_be_read(pages, width, dark):
    running, address = pages
    page = open_page(running, width=width, height=844, dark=dark)
    page.goto(address)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 30 and {name: found for name, found in contrasts.items() if found < 4.5} == {}
    assert page.outside == [] and page.faults == [] and page.evaluate("document.scripts.length") == 0
    clipped = (
        "e => [...document.querySelectorAll(e)].filter(x => x.getBoundingClientRect().right > innerWidth + 1).length"
    )
    assert page.evaluate(clipped, "h1, h2, h3, figure, .sample, .cards td, .said, .note") == 0


def test_contents_stay_in_sight_and_lead_to_each_section(pages):
    running, address = pages
    page = open_page(running, width=1280, height=844)
    page.goto(address)
    page.evaluate("document.documentElement.style.scrollBehavior = 'auto'")
    goals = page.evaluate("[...document.querySelectorAll('.toc.side a')].map(a => a.getAttribute('href'))")
    assert goals[:4] == ["#chain", "#against", "#gains", "#evaluations"] and "#stage-3" in goals
    for goal in goals:
        page.click(f".toc.side a[href='{goal}']")
        heading, side = page.locator(goal).bounding_box(), page.locator(".toc.side").bounding_box()
        assert -1 <= side["y"] <= 60 and (0 <= heading["y"] < 100 or goal == goals[-1])
    page.set_viewport_size({"width": 390, "height": 844})
    assert not page.locator(".toc.side").is_visible() and page.locator(".toc.top summary").is_visible()
    page.click(".toc.top summary")
    page.click(".toc.top a[href='#gains']")
    assert 0 <= page.locator("#gains").bounding_box()["y"] < 100


def test_paper_is_white_and_has_what_is_folded(pages):
    running, address = pages
    page = open_page(running, width=800, dark=True)
    page.goto(address)
    page.emulate_media(media="print")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor").removeprefix("rgb(").split(",")
    assert int(light[0]) > 240 and not page.locator(".toc.top").is_visible()
    assert page.evaluate(
        "[...document.querySelectorAll('details table')].some(t => t.getBoundingClientRect().height > 0)"
    )
