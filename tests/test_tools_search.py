"""The search tool: BM25 over a folder against its formula, an HTTP endpoint that answers, lies, stalls or is gone.

Run: pytest tests/test_tools_search.py
"""

import json
import math
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from recipe_runs import ROOT
from test_tool_rollouts import tool_tokenizer

from posttrain.errors import UserError
from posttrain.tool_calls import ToolRunner
from posttrain.tools import check_tools, load_tools
from posttrain.tools.search import NOTHING, passages, results_of

FACTS = [
    "Titor Ashby lives in Fenwick and works as a baker.",
    "Titor Brandt lives in Calder.",
    "Mara Ashby lives in Calder and keeps bees, and bees, and more bees.",
    "Fenwick has a bridge. The bridge of Fenwick is old.",
    "Bakers rise early.",
]


def search(**options):
    [tool] = load_tools(["search"], {"search": options})
    return lambda query: tool.call({"query": query})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("docs")
    (root / "people.jsonl").write_text("\n".join(json.dumps({"text": fact}) for fact in FACTS[:3]) + "\n")
    (root / "deep").mkdir()
    (root / "deep" / "towns.txt").write_text(FACTS[3])
    (root / "work.md").write_text(f"\ufeff{FACTS[4]}", encoding="utf-8")
    (root / "picture.png").write_bytes(b"\x89PNG")
    return root


def bm25(query: list[str], texts: list[list[str]]) -> list[float]:
    """Robertson's scores with Lucene's idf; k1 1.5, b 0.75."""
    mean = sum(map(len, texts)) / len(texts)
    scores = []
    for words in texts:
        score = 0.0
        for term in query:
            df, tf = sum(term in other for other in texts), words.count(term)
            idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
            score += idf * tf / (tf + 1.5 * (0.25 + 0.75 * len(words) / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize("query", ["Titor Ashby", "bees Calder", "fenwick BRIDGE", "Mara", "works baker Titor"])
def test_a_folder_is_searched_as_bm25_says(folder, query):
    order = [FACTS[3], *FACTS[:3], FACTS[4]]  # of files by path
    stop = {"in", "and", "as", "a", "the", "of", "is", "has"}
    texts = [[w.strip(".,").lower() for w in text.split() if w.strip(".,").lower() not in stop] for text in order]
    scores = bm25(query.lower().split(), texts)
    best = sorted((i for i in range(5) if scores[i]), key=lambda i: -scores[i])[:2]
    assert search(folder=str(folder), num_results=2)(query).split("\n") == [order[i] for i in best]


def test_what_is_not_there_is_not_found(folder):
    for query in ("zebra", "", "the of", "?!", "x"):
        assert search(folder=str(folder))(query) == NOTHING
    assert search(folder=str(folder))("bees zebra") == FACTS[2]


def test_passages_are_whole_sentences():
    text = "One is here.  Two is\nthere!\n\nA heading\n\n" + "word " * 30
    cut = passages("T", text, 40)
    assert cut[0] == "T: One is here. Two is there! A heading" and "".join(cut).count("word") == 30
    assert all(len(piece) <= 43 for piece in cut)
    assert passages("", "", 40) == []


def test_a_folder_that_changes_is_read_again(tmp_path):
    (tmp_path / "a.txt").write_text("apples")
    assert search(folder=str(tmp_path))("pears") == NOTHING
    (tmp_path / "b.txt").write_text("pears")
    assert search(folder=str(tmp_path))("pears") == "pears"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "search: folder, url: found neither"),
        ({"folder": "x", "url": "http://x"}, "folder, url: found both"),
        ({"foldr": "x"}, "unknown key 'foldr'; did you mean 'folder'"),
        ({"url": "ftp://x"}, "url: found 'ftp://x', expected http"),
        ({"folder": "x", "num_results": 0}, "num_results: found 0, expected a whole number of at least 1"),
        ({"folder": "x", "max_chars": "9"}, "max_chars: found '9'"),
        ({"url": "http://x", "timeout": -1}, "timeout: found -1"),
        ({"folder": 3}, "folder: found 3, expected some text"),
    ],
)
def test_wrong_options_stop_the_run(options, message):
    with pytest.raises(UserError, match=f"tool_options: .*{message}"):
        check_tools(["search"], {"search": options})


def test_options_of_other_tools_and_folders_without_text(tmp_path):
    for options, message in {
        "serch": "'serch' is not among the tools .calculator.",
        "calculator": "no options",
    }.items():
        with pytest.raises(UserError, match=message):
            load_tools(["calculator"], {options: {}})
    with pytest.raises(UserError, match="search: folder: no folder"):
        load_tools(["search"], {"search": {"folder": str(tmp_path / "none")}})
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(UserError, match="has no text; expected files of .txt, .md, .jsonl"):
        load_tools(["search"], {"search": {"folder": str(tmp_path)}})
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    broken = load_tools(["search"], {"search": {"folder": str(tmp_path)}})
    with pytest.raises(UserError, match="b.jsonl:2: found .*expected an object with 'text'"):
        ToolRunner(tool_tokenizer(), broken)  # before anything trains


# ---- an endpoint ----------------------------------------------------------------------------------------------------


class Endpoint(BaseHTTPRequestHandler):
    def do_GET(self):
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        asked = query.get("q", query.get("query", ["?"]))[0]
        found = {"title": "T", "content": f"about {asked} {query.get('format', [''])[0]}"}
        body = {
            "/searx": lambda: json.dumps({"query": asked, "results": [found, {"title": "only a title"}] * 5}),
            "/list": lambda: json.dumps([f"{asked} one", {"snippet": "two"}]),
            "/other": lambda: json.dumps({"hits": []}),
            "/html": lambda: "<html>",
            "/huge": lambda: json.dumps(["x" * 3_000_000]),
            "/slow": lambda: time.sleep(1) or "[]",
            "/picky": lambda: "[]" if asked == "test" else "<html>",
        }.get(path)
        self.send_response(404 if body is None else 200)
        self.end_headers()
        self.wfile.write(b"" if body is None else body().encode())

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_an_endpoints_answers_are_read(endpoint):
    assert search(url=f"{endpoint}/searx?format=json", num_results=2)("a & b") == "T: about a & b json\nonly a title"
    assert search(url=f"{endpoint}/list", query_key="query")("x") == "x one\ntwo"
    assert search(url=f"{endpoint}/list", query_key="query", max_chars=20)("word " * 9).split("\n")[0].endswith(" ...")
    assert results_of([{"url": "no text"}]) is None and results_of({"results": []}) == []


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/none", "HTTP 404, expected 200"),
        ("/other", "neither a list nor"),
        ("/html", "no JSON"),
        ("/huge", "an answer of more than 2,000,000 bytes"),
        ("/slow", "ReadTimeout"),
    ],
)
def test_a_bad_endpoint_stops_the_run_and_later_is_an_error_text(endpoint, path, said):
    tools = load_tools(["search"], {"search": {"url": endpoint + path, "timeout": 0.3}})
    with pytest.raises(UserError, match=f"search: url: {endpoint}{path}: .*{said}.*; start the endpoint"):
        ToolRunner(tool_tokenizer(), tools)
    assert tools[0].call({"query": "x"}).startswith("error: the search failed: ") and said in tools[0].call(
        {"query": "x"}
    )


def test_an_endpoint_that_fails_or_goes_away_while_the_model_talks(endpoint):
    tools = load_tools(["search"], {"search": {"url": f"{endpoint}/picky"}})
    ToolRunner(tool_tokenizer(), tools)
    assert tools[0].call({"query": "x"}).startswith("error: the search failed: no JSON")
    gone = load_tools(["search"], {"search": {"url": "http://127.0.0.1:9"}})
    assert "ConnectError" in gone[0].call({"query": "x"})


def test_the_index_leaves_numba_alone(tmp_path):
    """vLLM 0.31 dies where llvmlite is loaded, which numba brings and bm25s would import."""
    (tmp_path / "a.txt").write_text("Titor Ashby lives in Arvale.")
    script = (
        "import sys; from posttrain.tools import load_tools; "
        f"[tool] = load_tools(['search'], {{'search': {{'folder': {str(tmp_path)!r}}}}}); "
        "print(tool.call({'query': 'Ashby'})); print([n for n in sys.modules if n in ('numba', 'llvmlite')]); "
        "import numba"
    )
    pytest.importorskip("numba", reason="numba is not installed: nothing to import")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Titor Ashby lives in Arvale.\n[]\n"
