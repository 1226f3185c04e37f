"""The report: built from run folders written by hand, read back with html.parser."""

import json
import math
import re
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from posttrain import curves, figures
from posttrain.curves import Panel, panels
from posttrain.errors import UserError
from posttrain.report import gains_table, read_run, visible, write_report

HOSTILE = """<script>alert(1)</script><img src=x onerror=alert(2)></pre></style><a href="javascript:alert(3)">x</a>
<svg onload=alert(4)>{{ 7*7 }} {% raw %} &lt; "'><iframe src=//evil.example></iframe>\x1b[31m\x00 \ud800"""


TAGS = """html head meta title style body main header section footer p h1 h2 h3 ul li b span div pre code a br table
thead tbody tr th td nav figure figcaption details summary svg path text circle rect g"""
ALLOWED = set(TAGS.split())


def measured(value: float, half: float | None = None, **more) -> dict:
    return {"value": value, "low": half and value - half, "high": half and value + half, **more}


def gain(name: str = "sums, pass@1", passed: bool | None = True, **more) -> dict:
    before, after = measured(0.534, 0.024, label="SFT"), measured(0.921, 0.013, label="GRPO")
    return {"name": name, "before": before, "after": after, "unit": "%", "passed": passed, "goal": "30 points"} | more


def put(run: Path, name: str, roles: dict[str, str], **more) -> str:
    """Writes a stage folder; `roles` maps a role to a stage of this run, whose present hash is stored."""
    digests = {p: sha256((run / p / "stage.json").read_bytes()).hexdigest() for p in roles.values()}
    manifest = {
        "format": 1,
        "stage": name,
        "status": "finished",
        "created": "2026-01-01T00:00:00Z",
        "seed": 0,
        "parents": {role: {"path": f"runs/x/{p}", "stage": p, "sha256": digests[p]} for role, p in roles.items()},
        "data": [{"name": "tiny", "config": "documents", "split": "train", "rows": 12345, "sha256": "d" * 64}],
        "tokenizer_sha256": "a" * 64,
        "chat_template_sha256": None,
        "config": {"learning_rate": 0.00123, "report_to": []},
        "git_commit": None,
        "versions": {"torch": "2.13.0"},
        "machine": {"device": "cpu", "cores": 2},
        "metrics": {"eval/pass@1": measured(0.534, 0.024, n=1600, unit="%"), "vocab_size": {"value": 1024}},
        "gains": [gain(f"gain of {name}")],
        "samples": [{"prompt": "What is 27 + 48?", "replies": [{"by": name, "text": f"reply of {name}"}]}],
        "wall_time_s": 93.1,
        "tokens": 3_400_000,
        "parameters": 1_012_345,
        "files": {"model.safetensors": {"sha256": "b" * 64, "bytes": 4_123_456}},
    } | more
    (run / name).mkdir(parents=True, exist_ok=True)
    (run / name / "stage.json").write_text(json.dumps(manifest))
    rows = [{"step": step, "loss": 2 / step, "learning_rate": 1e-3} for step in range(1, 61)]
    (run / name / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "tiny"
    put(run, "pretrain", {})
    put(run, "sft", {"policy": "pretrain"})
    put(run, "reward", {"policy": "sft"})
    put(run, "ppo", {"policy": "sft", "reward": "reward"}, gains=[gain("true utility", passed=False)])
    return run


class Page(HTMLParser):
    """Every tag with its attributes, the text outside <style>, and the style sheet."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = self.style = ""
        self.source = path.read_text("utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "style" and not self.style:
            self.style = data
        else:
            self.text += data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def assert_inert(page: Page) -> None:
    """No tag that runs or loads, no handler, no address but an anchor of this page, nothing loaded by the style."""
    assert not {tag for tag, _ in page.tags} - ALLOWED
    for tag, attrs in page.tags:
        assert not [
            name for name in attrs if name.startswith("on") or name in ("src", "srcset", "action", "xlink:href")
        ]
        assert attrs.get("href", "#").startswith("#"), (tag, attrs)
    assert "@import" not in page.style and "url(" not in page.style
    assert "default-src 'none'" in next(a["content"] for _, a in page.tags if "http-equiv" in a)


def test_page_holds_what_the_stages_stored(run):
    (run / "chain.json").write_text(json.dumps({"name": "my chain", "stages": ["pretrain", "sft", "reward", "ppo"]}))
    path = write_report(run)
    assert path == run / "report.html" and [p.name for p in run.glob("report*")] == ["report.html"]
    page = Page(path)
    assert_inert(page)
    for text in (
        "my chain",
        "53.4 %",
        "[51.0, 55.8]",
        "92.1 %",
        "[90.8, 93.4]",
        "1,600",
        "12,345",
        "1,024",
        "0.00123",
    ):
        assert text in page.words, text
    for text in ("1.01M parameters", "3.40M", "1 m 33 s", "6 m 12 s", "13.6M", "2.13.0", "b" * 64, "4.12M bytes"):
        assert text in page.words, text  # 4 x 93.1 s and 4 x 3.4M tokens in the totals
    assert (
        "3 of 4 gains shown" in page.words and "✗ not shown" in page.words and "4 of 4 stages finished" in page.words
    )
    assert not page.words.count("None") and "undefined" not in page.words.lower()


def test_every_picture_is_well_formed_and_named(run):
    source = Page(write_report(run)).source
    pictures = re.findall(r"<svg.*?</svg>", source, re.S)
    assert (
        len(pictures) == 2 + 4 + 4
    )  # the chain twice, a strip a gain, a curve a stage (its learning rate is constant)
    for picture in pictures:
        tree = ElementTree.fromstring(picture)
        assert tree.find("title").text and "nan" not in picture
        _, _, width, height = map(float, tree.get("viewBox").split())
        assert all(-1 <= float(e.get("x")) <= width and -1 <= float(e.get("y")) <= height for e in tree.iter("text"))


def test_model_output_is_inert_wherever_it_stands(run):
    replies = [{"by": HOSTILE, "text": HOSTILE}, {"by": "javascript:alert(5)", "text": ""}]
    put(
        run,
        "grpo",
        {"policy": "sft"},
        samples=[{"prompt": HOSTILE, "replies": replies}],
        gains=[gain(HOSTILE, goal=HOSTILE, unit=HOSTILE)],
        config={HOSTILE: HOSTILE},
        metrics={HOSTILE: measured(1, unit=HOSTILE)},
        data=[{"name": HOSTILE, "sha256": '"><script>'}],
        parents={HOSTILE: {"path": HOSTILE.split("\x1b")[0], "sha256": None}},
    )
    row = {"step": 1, "prompt": HOSTILE, "completion": HOSTILE, "reward": 1.0, "rewards": {HOSTILE: 1.0, "b": 2}}
    (run / "grpo" / "rollouts.jsonl").write_text(json.dumps(row) + "\n")
    (run / "grpo" / "log.jsonl").write_text("".join(json.dumps({"step": s, HOSTILE: s}) + "\n" for s in (1, 2)))
    page = Page(write_report(run))
    assert_inert(page)
    assert page.words.count("<script>alert(1)</script>") >= 8 and "{{ 7*7 }}" in page.words
    assert "\x1b" not in page.source and "\x00" not in page.source and "empty reply" in page.words
    assert "\x1b" not in gains_table(run)


def test_unfinished_stages_are_shown_as_such(run):
    stages = ["pretrain", "sft", "reward", "ppo", "grpo", "rejection"]
    (run / "chain.json").write_text(json.dumps({"stages": stages, "status": {"grpo": "failed"}}))
    (run / "grpo").mkdir()
    (run / "grpo" / "log.jsonl").write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.7}\n{"step": 3, "rew')
    page = Page(write_report(run))
    assert "grpo: failed, so no gain to show" in page.words
    assert "rejection: not started, so no gain to show" in page.words
    assert "4 of 6 stages finished" in page.words and "reward 0.7" in page.words  # the curve as far as it goes
    assert "grpo: failed, so no gain to show" in gains_table(run)
    (run / "chain.json").write_text(json.dumps({"stages": stages}))
    assert "grpo ● not finished".replace("● ", "") in Page(write_report(run)).words


def test_order_and_parents_without_chain_json(run):
    put(run, "distil", {"policy": "ppo"})  # sorts before its parent by name
    chain, stages = read_run(run)
    names = [stage.name for stage in stages]
    assert chain == {} and names.index("ppo") < names.index("distil") and names.index("pretrain") == 0
    assert next(s for s in stages if s.name == "ppo").parents == [("policy", "sft", True), ("reward", "reward", True)]
    assert [s.name for s in read_run(run, ["sft", "pretrain"])[1]] == ["sft", "pretrain"]


def test_changed_and_outside_parents_are_told(run):
    manifest = json.loads((run / "sft" / "stage.json").read_text())
    manifest["seed"] = 1
    (run / "sft" / "stage.json").write_text(json.dumps(manifest))
    ppo = json.loads((run / "ppo" / "stage.json").read_text())
    ppo["parents"]["policy"]["path"] = str(run / "sft")
    ppo["parents"]["reference"] = {"path": "HuggingFaceTB/SmolLM2-135M", "stage": None, "sha256": None}
    (run / "ppo" / "stage.json").write_text(json.dumps(ppo))
    page = Page(write_report(run))
    assert "ppo was made from an earlier sft (policy)" in page.words
    assert "from outside this run" in page.words and "SmolLM2-135M" in page.words


def test_rollouts_of_the_first_and_last_step(run):
    rows = [
        {"step": step, "prompt": f"prompt {i}", "completion": f"answer {step}-{i}", "reward": i / 8, "stop": "length"}
        for step in (1, 2, 3)
        for i in range(8)
    ]
    (run / "ppo" / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = Page(write_report(run)).words
    assert all(f"answer 1-{i}" in words and f"answer 3-{i}" in words for i in (0, 2, 4, 6))
    assert "answer 2-" not in words and "4 of 8" in words and "cut at the limit" in words


def test_same_prompt_stands_once_with_a_reply_a_stage(run):
    page = Page(write_report(run))
    shown = [tag for tag, attrs in page.tags if attrs.get("class") == "sample"]
    assert len(shown) == 1 and all(f"reply of {name}" in page.words for name in ("pretrain", "sft", "reward", "ppo"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "not JSON"),
        ("[]", "found list"),
        ('{"stage": ""}', "'stage'"),
        ('{"stage": "sft", "status": "finished", "metrics": []}', "'metrics'"),
        ('{"stage": "sft", "status": "finished", "gains": [{"name": "x"}]}', "gains[0]['before']"),
        ('{"stage": "sft", "status": "finished", "metrics": {"m": {"value": "0.5"}}}', "metrics['m']"),
        ('{"stage": "sft", "status": "finished", "samples": [{"prompt": "x"}]}', "samples[0]"),
    ],
)
def test_broken_stage_json_is_named(run, content, told):
    (run / "sft" / "stage.json").write_text(content)
    for read in (write_report, gains_table):
        with pytest.raises(UserError) as error:
            read(run)
        assert str(run / "sft" / "stage.json") in str(error.value) and told in str(error.value)
    assert not (run / "report.html").exists()


def test_other_broken_input_is_named(run, tmp_path):
    (run / "sft" / "log.jsonl").write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(UserError, match=re.escape(str(run / "sft" / "log.jsonl")) + ":2: not JSON"):
        write_report(run)
    with pytest.raises(UserError, match="no such run folder"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no stage in it"):
        gains_table(tmp_path / "empty")
    (run / "chain.json").write_text('{"stages": "sft"}')
    with pytest.raises(UserError, match=r"chain\.json: stages is 'sft'"):
        write_report(run)


def test_parents_in_a_circle_are_refused(run):
    manifest = json.loads((run / "pretrain" / "stage.json").read_text())
    manifest["parents"] = {"policy": {"path": str(run / "ppo"), "sha256": None}}
    (run / "pretrain" / "stage.json").write_text(json.dumps(manifest))
    for stage, parent in (("sft", "pretrain"), ("reward", "sft"), ("ppo", "reward")):
        text = json.loads((run / stage / "stage.json").read_text())
        text["parents"]["policy"] = {"path": str(run / parent), "sha256": None}
        (run / stage / "stage.json").write_text(json.dumps(text))
    with pytest.raises(UserError, match="each other's parents"):
        write_report(run)


def test_gains_table_is_narrow_and_honest(run):
    long = gain("a gain whose name is much longer than its column " * 3, goal="a goal of many words " * 4)
    unjudged = gain("bits", None, unit="bits/byte", before=measured(583.2, 1.5, label="a trigram of bytes"))
    put(run, "grpo", {"policy": "sft"}, gains=[long, unjudged])
    table = gains_table(run)
    lines = table.splitlines()
    assert max(map(len, lines)) <= 119 and lines[0].split() == ["stage", "gain", "before", "after", "goal", "result"]
    starts = [lines[0].index(word) for word in ("gain", "before", "after", "goal", "result")]
    assert all(line[start - 1 : start] in ("", " ") for line in lines[2:-1] for start in starts)
    ppo = next(line for line in lines if line.startswith("ppo"))
    assert ppo.endswith("not shown") and "53.4 % [51.0, 55.8]" in ppo
    assert "583.2 [581.7, 584.7]" in table and "not judged" in table
    assert lines[-1].startswith("4 of 6 gains shown")


def test_panels_group_rank_and_count():
    log = [
        {"step": s, "time": s, "kl": s, "loss": 1 / s, "learning_rate": s, "lr": 1.0, "note": "x"} for s in (1, 2, 3)
    ]
    log += [{"step": 3, "eval_loss": 0.4, "loss": math.nan}, {"step": 2, "eval_loss": 0.5, "kl": 7}]
    drawn, single = panels(log)
    assert [panel.name for panel in drawn] == ["loss", "kl", "learning_rate", "time"]
    assert drawn[0].lines == {"loss": [(1, 1.0), (2, 0.5)], "eval_loss": [(2, 0.5), (3, 0.4)]}
    assert drawn[0].skipped == 1 and single == {"lr": 1.0}
    assert drawn[1].lines["kl"] == [(1, 1), (2, 7), (3, 3)]  # logged twice: the later value


def test_long_curves_keep_their_spikes():
    points = [(step, 1.0 + 0.1 * (step % 2)) for step in range(5000)]
    points[3210] = (3210, 9.0)
    picture = curves.curves(Panel("reward", lines={"reward": points}))
    tops = [float(y) for path in re.findall(r'd="M([^"HV]+)"', picture) for y in re.findall(r" (\d+\.\d)", path)]
    assert len(picture) < 40_000 and min(tops) < 20  # the top of the panel


def test_edges_pass_beside_boxes_and_not_behind():
    names = ["a", "b", "c", "d"]
    boxes = [{"name": n, "title": n, "lines": [], "state": "finished", "href": None} for n in names]
    edges = [("a", "b", "", "known"), ("a", "c", "", "known"), ("b", "d", "x", "known"), ("a", "d", "y", "known")]
    tree = ElementTree.fromstring(figures.chain(boxes, edges))
    rects = {n: {k: float(v) for k, v in r.attrib.items()} for n, r in zip(names, tree.iter("rect"), strict=True)}
    straight = [re.search(r"C\S+ \S+ \S+ \S+ (\S+) (\S+)L(\S+) (\S+)C", e.get("d")) for e in tree.iter("path")]
    ((x1, y1, x2, y2),) = [tuple(map(float, match.groups())) for match in straight if match]
    assert y1 == y2 and x1 == rects["b"]["x"] and x2 == rects["b"]["x"] + rects["b"]["width"]
    assert not any(rects[n]["y"] <= y1 <= rects[n]["y"] + rects[n]["height"] for n in ("b", "c"))
    assert rects["a"]["x"] < rects["b"]["x"] == rects["c"]["x"] < rects["d"]["x"]


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (figures.number(12345), "12,345"),
        (figures.number(53.2149), "53.21"),
        (figures.number(0.01234), "0.0123"),
        (figures.number(0.00001), "1.0e-05"),
        (figures.number(math.nan), "–"),
        (figures.compact(3_400_000), "3.40M"),
        (figures.compact(12_345), "12.3k"),
        (figures.compact(950), "950"),
        (figures.duration(0.84), "0.8 s"),
        (figures.duration(59.7), "1 m 00 s"),
        (figures.duration(7500), "2 h 05 m"),
        (figures.measure(measured(0.5344, 0.024), "%"), ("53.4 %", "[51.0, 55.8]")),
        (figures.measure(measured(1.31234, 0.04)), ("1.312", "[1.272, 1.352]")),
        (figures.measure(measured(583.2, 21.0)), ("583", "[562, 604]")),
        (figures.measure({"value": 0.5}), ("0.5", "")),
        (figures.measure({"value": math.nan, "low": math.nan, "high": math.nan}), ("–", "")),
        (visible("a\x1b[0m\n\u0007é"), "a\ufffd[0m\n\ufffdé"),
        (visible("x" * 4001)[-24:], "x … (1 more characters)"[-24:].rjust(24, "x")),
    ],
)
def test_numbers_read_well(made, expected):
    assert made == expected
