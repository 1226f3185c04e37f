"""Data sets of the Hub, fetched by the real client from a server on this machine that speaks the Hub's API.

Run: pytest tests/test_data_hub.py
"""

import gzip
import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

import pytest
from recipe_runs import ENV

NEW, OLD = "a" * 40, "0123456789abcdef0123456789abcdef01234567"
CARD = """---
configs:
- config_name: main
  default: true
  data_files:
  - {split: train, path: data/train.jsonl.gz}
  - {split: test, path: data/test.jsonl}
- config_name: broken
  data_files: broken.jsonl
---
"""
ROWS = [{"text": f"row {i}", "number": i} for i in range(50)]


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def files_of(rows) -> dict[str, bytes]:
    return {
        "README.md": CARD.encode(),
        "data/train.jsonl.gz": gzip.compress(jsonl(rows)),
        "data/test.jsonl": jsonl(rows[:3]),
        "broken.jsonl": b'{"text": "a"}\n{"text": ',
    }


COMMITS = {OLD: files_of(ROWS[:7]), NEW: files_of(ROWS)}
REVISIONS = {"main": NEW, "v1": OLD, NEW: NEW, OLD: OLD}


class Hub(BaseHTTPRequestHandler):
    """One data set, some/data, with two commits: what datasets' client asks of it, as the Hub answers."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, code: int, body: bytes = b"{}", **headers):
        self.send_response(code)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = unquote(urlparse(self.path).path).strip("/").split("/")
        if parts[:4] == ["api", "datasets", "some", "data"]:
            kind, revision = [*parts[4:6], "revision", "main"][:2] if len(parts) > 5 else ("revision", "main")
            files, commit = COMMITS.get(REVISIONS.get(revision), {}), REVISIONS.get(revision)
            if commit and kind == "revision":
                names = [{"rfilename": name} for name in files]
                return self.answer(200, json.dumps({"id": "some/data", "sha": commit, "siblings": names}).encode())
            if commit and kind == "tree":
                folder = "/".join(parts[6:])
                found = [self.entry(name, content) for name, content in files.items() if name.startswith(folder)]
                return self.answer(200, json.dumps(found).encode())
        if parts[:4] == ["datasets", "some", "data", "resolve"]:
            commit, name = REVISIONS.get(parts[4]), "/".join(parts[5:])
            if commit is None:
                return self.answer(404, X_Error_Code="RevisionNotFound")
            if name in COMMITS[commit]:
                content = COMMITS[commit][name]
                tag = hashlib.sha1(content).hexdigest()
                return self.answer(200, content, ETag=f'"{tag}"', X_Repo_Commit=commit)
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        return self.answer(404, X_Error_Code="RepoNotFound")

    do_HEAD = do_POST = do_GET

    @staticmethod
    def entry(name: str, content: bytes) -> dict:
        return {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": name}


@pytest.fixture(scope="module")
def hub():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


SCRIPT = """
import json, sys
from posttrain.data import DataConfig, check, load_rows, stream_rows
from posttrain.errors import UserError
for keys, split in json.loads(sys.argv[1]):
    try:
        rows, description = load_rows(DataConfig(**keys), split, 0, ("text",))
        print(json.dumps([rows, description]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture
def load(hub, tmp_path):
    """`load((keys, split), ...)` in a process of its own, since the client reads its settings when it is imported."""

    def run(*wanted, **env):
        env = {**ENV, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), **env}
        env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "PATH": "/usr/bin:/bin"}
        command = [sys.executable, "-c", SCRIPT, json.dumps(wanted)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines() if line[:1] in '["']

    return run


def test_rows_and_the_commit_they_come_from(load):
    """The newest commit, a tag's, a slice after an adapter, the held-out split, some of a stream."""
    reverse = {"dataset_adapter": "test_data.reversed_rows"}
    wanted = [
        ({"dataset_name": "some/data"}, "train"),
        ({"dataset_name": "some/data", "dataset_config": "main"}, "test"),
        ({"dataset_name": "some/data", "dataset_revision": "v1"}, "train"),
        ({"dataset_name": "some/data", "dataset_revision": OLD, **reverse}, "train[:2]"),
        ({"dataset_name": "some/data", "streaming": True, "max_rows": 5}, "train"),
        ({"dataset_name": "some/data", "streaming": True, "max_rows": 5, "dataset_revision": "v1"}, "train[5:]"),
    ]
    (rows, facts), (test, _), (old, old_facts), (cut, _), (few, few_facts), (tail, tail_facts) = load(*wanted)
    assert rows == ROWS and facts["revision"] == NEW and facts["rows"] == 50
    assert test == ROWS[:3]
    assert old == ROWS[:7] and old_facts["revision"] == OLD and old_facts["sha256"] != facts["sha256"]
    assert cut == [{"text": "0 wor"}, {"text": "1 wor"}]
    assert few == ROWS[:5] and few_facts["revision"] == NEW
    assert tail == ROWS[5:7] and tail_facts["revision"] == OLD


def test_without_a_network_a_revision_is_never_another_one(load):
    """The client of datasets 5.2 gives what it fetched last, whatever revision is asked for."""
    name = {"dataset_name": "some/data"}
    load(({**name, "dataset_revision": "v1"}, "train"))
    asked = [({**name, **more}, "train") for more in ({}, {"dataset_revision": OLD}, {"dataset_revision": NEW})]
    last, same, other = load(*asked, HF_HUB_OFFLINE="1")
    assert last == same and last[0] == ROWS[:7] and last[1]["revision"] == OLD
    assert other.startswith(
        f"dataset_revision: {NEW} of some/data cannot be looked up without a network, and the newest"
    )
    assert other.endswith(
        f"newest in the cache is commit {OLD}: connect to the network, or set dataset_revision: {OLD}"
    )


def test_what_cannot_be_fetched(load):
    name = {"dataset_name": "some/data"}
    errors = load(
        ({"dataset_name": "some/other"}, "train"),
        ({**name, "dataset_config": "mian"}, "train"),
        (name, "valid"),
        ({**name, "dataset_revision": "v2"}, "train"),
        ({**name, "dataset_config": "broken"}, "train"),
        ({**name, "dataset_config": "broken", "streaming": True, "max_rows": 9}, "train"),
        ({**name, "streaming": True, "max_rows": 9}, "train[:10%]"),
    )
    words = [
        "dataset_name: 'some/other' could not be loaded from the Hub: Dataset 'some/other' doesn't exist",
        "'some/data' could not be loaded from the Hub: BuilderConfig 'mian' not found. Available: ['main', 'broken']",
        "Unknown split \"valid\". Should be one of ['train', 'test']",
        "dataset_revision 'v2' and the network, or name a local file or folder",
        "'some/data' could not be loaded from the Hub: ",
        "'some/data' could not be loaded from the Hub: ",
        "split: found 'train[:10%]', but with streaming the number of rows is not known",
    ]
    assert len(errors) == len(words)
    for error, found in zip(errors, words, strict=True):
        assert isinstance(error, str) and found in error, error
        assert "\n" not in error and len(error) < 400
