"""The report of a cleaning stage: its picture, and samples of hostile pages as harmless text.

Run: pytest tests/test_web_report.py
"""

import json
import re

from posttrain import report, web_figure

EVIL = "<script>alert(1)</script><img src=http://x.example/a.png onerror=x>\u202e\x1b[31m"
CLEANING = {
    "read": 200, "kept": 50, "characters": 1000,
    "steps": [
        {"name": "read", "in": 200, "out": 200, "dropped": {}, "also": {"encoding_utf-8": 200}, "samples": []},
        {
            "name": "gopher_quality", "in": 200, "out": 50, "also": {},
            "dropped": {"gopher_short_doc": 90, "gopher_long_doc": 30, "c": 20, "d": 7, EVIL: 3},
            "samples": [{"reason": "gopher_short_doc", "url": f"http://a.example/{EVIL}", "text": EVIL + " short"}],
        },
        {"name": "pii", "in": 50, "out": 50, "dropped": {}, "also": {"emails": 4, "ips": 1}, "samples": []},
    ],
}  # fmt: skip


def page(tmp_path, cleaning) -> str:
    (tmp_path / "clean").mkdir()
    manifest = {"stage": "clean", "status": "finished", "metrics": {}, "gains": [], "cleaning": cleaning}
    (tmp_path / "clean" / "stage.json").write_text(json.dumps(manifest))
    return report.write_report(tmp_path).read_text()


def test_bars_are_as_wide_as_what_went_in_and_came_out():
    widths = {
        kind: [float(w) for w in re.findall(rf'class="{kind}"[^>]* width="([\d.]+)"', web_figure.funnel(CLEANING))]
        for kind in ("went-in", "came-out")
    }
    full = widths["went-in"][0]
    assert [round(w / full, 2) for w in widths["went-in"]] == [1, 1, 0.25]
    assert [round(w / full, 2) for w in widths["came-out"]] == [1, 0.25, 0.25]


def test_reasons_by_how_much_they_dropped():
    said = web_figure.reasons(CLEANING["steps"][1])
    assert said == "dropped 150: gopher_short_doc 90, gopher_long_doc 30, c 20, other 10"
    assert web_figure.reasons(CLEANING["steps"][2]) == "masked: emails 4, ips 1"
    assert web_figure.reasons(CLEANING["steps"][0]) == ""


def test_dropped_pages_are_shown_as_text(tmp_path):
    text = page(tmp_path, CLEANING)
    assert "50 of 200 pages" in text and "1 dropped page, the first of each reason" in text
    assert "<script" not in text and "<img" not in text and "\x1b" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_other_stages_have_no_such_picture(tmp_path):
    assert web_figure.pictures({}) == [] and web_figure.dropped({}) == []
    assert "funnel" not in page(tmp_path, None).split("</style>")[1]
