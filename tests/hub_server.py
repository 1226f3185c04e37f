"""A small Hub on this machine: what huggingface_hub's client asks of the real one to push, look at and pull models.

In: tokens with their users, faults to inject. Out: the repositories in memory, and what was asked, in order. Launched:

    with Hub() as hub: subprocess.run(..., env=hub.env(home))

Spoken: whoami-v2, repos/create, validate-yaml, auth-check, preupload, LFS batch (basic and multipart uploads), commit
as NDJSON, model info, tree, resolve with HEAD and GET. Xet is not: clients run with HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

import yaml

ANN, READER, BOB = "hf_" + "ann" * 10, "hf_" + "read" * 8, "hf_" + "bob" * 10
LARGE = (".safetensors", "/tokenizer.json")  # what goes to the large-file store, as .gitattributes of the Hub say
STEP = 1 << 12


@dataclass
class Repo:
    """Commits, the newest last, each name -> bytes; and the messages of those that were pushed."""

    owner: str
    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b"*.safetensors lfs\n"}])
    messages: list[str] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    def sha(self, number: int = -1) -> str:
        number %= len(self.commits)
        files = [[name, git_hash(content)] for name, content in sorted(self.commits[number].items())]
        return hashlib.sha1(json.dumps([number, self.owner, files]).encode()).hexdigest()

    def at(self, revision: str) -> int | None:
        shas = [self.sha(n) for n in range(len(self.commits))]
        return len(shas) - 1 if revision == "main" else shas.index(revision) if revision in shas else None


class Hub:
    """The server. `faults`: (pattern, what to do in place of answering); each is used once, by the first request that
    its pattern finds, "POST api/repos/create" say. What returns "go on" lets the request be answered after it."""

    def __init__(self, chunk: int | None = None):
        self.users = {ANN: ("ann", "write"), READER: ("ann", "read"), BOB: ("bob", "write")}
        self.repos: dict[str, Repo] = {}
        self.store: dict[str, bytes] = {}  # large files by their SHA-256
        self.parts: dict[tuple[str, int], bytes] = {}
        self.received: dict[
            str, int
        ] = {}  # bytes that came in for a large file, by its SHA-256, dropped ones included
        self.asked: list[str] = []
        self.faults: list[tuple] = []
        self.chunk = chunk  # bytes of a part of a large file; None: each in one piece

    def __enter__(self):
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def env(self, home, token: str | None = ANN) -> dict[str, str]:
        """For a client in a process of its own: it reads its settings when it is imported."""
        found = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        found |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": token or "", "HF_TOKEN_PATH": str(home / "no-token")}
        return found | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    def everything(self) -> bytes:
        """All bytes that are kept, for a search."""
        kept = [content for repo in self.repos.values() for files in repo.commits for content in files.values()]
        names = [name for repo in self.repos.values() for files in repo.commits for name in files]
        return b"\n".join([*kept, *self.store.values(), json.dumps([names, sorted(self.repos)]).encode()])


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        try:
            super().handle_one_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def do_GET(self):
        url = urlparse(self.path)
        self.query, path = parse_qs(url.query), unquote(url.path).strip("/")
        self.hub.asked.append(f"{self.command} {path}")
        fault = next((entry for entry in self.hub.faults if re.search(entry[0], f"{self.command} {path}")), None)
        if fault is not None:
            self.hub.faults.remove(fault)
            if fault[1](self) != "go on":
                return None
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, f"{self.command.replace('HEAD', 'GET')} {path}"):
                return getattr(self, method)(**found.groupdict())
        self.body()
        return self.answer(404, {"error": f"no such route: {path}"})

    do_HEAD = do_POST = do_PUT = do_GET

    # --- plumbing

    def body(self, count: str | None = None) -> bytes:
        """The request's body, counted under the large file's id as it comes in."""
        content = b""
        for step in self.steps():
            content += step
            if count:
                self.hub.received[count] = self.hub.received.get(count, 0) + len(step)
        return content

    def steps(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            step = self.rfile.read(min(STEP, left))
            if not step:
                raise ConnectionResetError
            left -= len(step)
            yield step

    def drop(self, after: int | None = None):
        """Break the connection off, of an upload after so many bytes."""
        oid, got = self.path.split("/")[2].partition("?")[0], 0
        for step in self.steps() if after is not None else ():
            got += len(step)
            if got >= after:
                break
        self.hub.received[oid] = self.hub.received.get(oid, 0) + got
        self.close_connection = True
        self.connection.shutdown(2)

    def refuse(self, code: int, **headers):
        self.body()
        self.answer(code, {"error": "injected"}, **headers)

    def answer(self, code: int, value=None, content: bytes | None = None, **headers):
        content = json.dumps(value if value is not None else {}).encode() if content is None else content
        self.send_response(code)
        said = {"X-Error-Message": value["error"]} if value and "error" in value else {}
        for name, header in {"Content-Length": len(content), **said, **headers}.items():
            self.send_header(name.replace("_", "-"), str(header))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def user(self) -> tuple[str | None, str]:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return self.hub.users.get(token, (None, "none"))

    def repo(self, name: str, write: bool = False) -> Repo | None:
        """The repository, or None after the answer that the Hub gives to who may not see or change it."""
        found, (user, role) = self.hub.repos.get(name), self.user()
        if found is None or (found.private and user != found.owner):
            self.body()
            self.answer(404 if user else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif write and (user != found.owner or role != "write"):
            self.body()
            self.answer(403, {"error": "You have no right to write to this repository"})
        else:
            return found
        return None

    # --- accounts and repositories

    def whoami(self):
        name, role = self.user()
        if name is None:
            return self.answer(401, {"error": "Invalid credentials"})
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        return self.answer(200, {"type": "user", "name": name, "orgs": [], "auth": auth})

    def create(self):
        asked, (user, role) = json.loads(self.body()), self.user()
        owner = asked.get("organization") or user
        name = f"{owner}/{asked['name']}"
        if user is None or role != "write" or owner != user:
            return self.answer(403, {"error": f"You don't have the rights to create a model under {owner}"})
        if name in self.hub.repos:
            return self.answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        self.hub.repos[name] = Repo(owner, asked.get("visibility") == "private" or bool(asked.get("private")))
        return self.answer(200, {"url": f"{self.hub.url}/{name}"})

    def validate(self):
        """The Hub's rules that concern us: names of licences, ids, a data set's type in model-index."""
        head = yaml.safe_load(re.match("---\n(.*?)\n---\n", json.loads(self.body())["content"], re.S)[1])
        errors = []
        for key in ("base_model", "datasets"):
            for name in [head[key]] if isinstance(head.get(key), str) else head.get(key) or ():
                if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
                    errors.append({"message": f'"{key}" with value "{name}" is not valid'})
        for model in head.get("model-index", ()):
            for result in model["results"]:
                if not re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", result["dataset"]["type"]):
                    errors.append({"message": f"dataset type {result['dataset']['type']}"})
                if not (result["task"]["type"] and all("value" in m and m["type"] for m in result["metrics"])):
                    errors.append({"message": "a result without task, type or value"})
        return self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, name: str, revision: str = "main"):
        repo = self.repo(name)
        if repo is None:
            return None
        number = repo.at(revision)
        if number is None:
            return self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        siblings = [{"rfilename": file} for file in repo.commits[number]]
        told = {"_id": "1", "id": name, "sha": repo.sha(number), "private": repo.private, "siblings": siblings}
        return self.answer(200, told | {"tags": [], "downloads": 0, "likes": 0})

    def auth_check(self, name: str, write: str | None = None):
        if self.repo(name, write=bool(write)) is not None:
            self.answer(200)

    def tree(self, name: str, revision: str, folder: str | None = None):
        repo = self.repo(name)
        if repo is None:
            return None
        files = repo.commits[repo.at(revision)]
        entries = [
            {"type": "file", "path": file, "size": len(content), "oid": git_hash(content)}
            for file, content in files.items()
            if file.startswith(folder or "")
        ]
        return self.answer(200, entries)

    def resolve(self, name: str, revision: str, file: str):
        repo = self.repo(name)
        if repo is None:
            return None
        number = repo.at(revision)
        if number is None:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        if file not in repo.commits[number]:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=repo.sha(number))
        content = repo.commits[number][file]
        etag = hashlib.sha256(content).hexdigest() if is_large(file) else git_hash(content)
        return self.answer(200, content=content, ETag=f'"{etag}"', X_Repo_Commit=repo.sha(number))

    # --- uploads

    def preupload(self, name: str):
        repo = self.repo(name, write=True)
        if repo is None:
            return None
        found = []
        for file in json.loads(self.body())["files"]:
            path, old = file["path"], repo.files.get(file["path"])
            large = is_large(path)
            oid = None if old is None else hashlib.sha256(old).hexdigest() if large else git_hash(old)
            mode = "lfs" if large else "regular"
            found.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self.answer(200, {"files": found})

    def batch(self, name: str):
        if self.repo(name, write=True) is None:
            return None
        objects = []
        for one in json.loads(self.body())["objects"]:
            oid, size = one["oid"], one["size"]
            if oid in self.hub.store:
                objects.append({"oid": oid, "size": size})
                continue
            href, header = f"{self.hub.url}/lfs/{oid}", {}
            if self.hub.chunk:
                count = -(-size // self.hub.chunk)
                header = {"chunk_size": str(self.hub.chunk)}
                header |= {f"{n + 1:05}": f"{href}/{n + 1}?X-Amz-Signature=topsecret" for n in range(count)}
            url = f"{href}/done" if self.hub.chunk else f"{href}?X-Amz-Signature=topsecret"
            objects.append({"oid": oid, "size": size, "actions": {"upload": {"href": url, "header": header}}})
        return self.answer(200, {"transfer": "multipart" if self.hub.chunk else "basic", "objects": objects})

    def put(self, oid: str, part: str | None = None):
        content = self.body(count=oid)
        if part is not None:
            self.hub.parts[oid, int(part)] = content
            return self.answer(200, ETag=f'"{hashlib.md5(content).hexdigest()}"')
        return self.keep(oid, content)

    def complete(self, oid: str):
        parts = json.loads(self.body())["parts"]
        return self.keep(oid, b"".join(self.hub.parts[oid, part["partNumber"]] for part in parts))

    def keep(self, oid: str, content: bytes):
        if hashlib.sha256(content).hexdigest() != oid:
            return self.answer(400, {"error": "SHA-256 differs"})
        self.hub.store[oid] = content
        return self.answer(200)

    def commit(self, name: str):
        repo = self.repo(name, write=True)
        if repo is None:
            return None
        lines = [json.loads(line) for line in self.body().splitlines()]
        head = lines[0]["value"]
        if head.get("parentCommit") not in (None, repo.sha()):
            return self.answer(412, {"error": "A commit has happened since. Please refresh and try again."})
        files = dict(repo.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.store:
                    return self.answer(400, {"error": f"{value['path']} was not uploaded"})
                files[value["path"]] = self.hub.store[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repo.commits.append(files)
        repo.messages.append(head["summary"])
        return self.answer(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{repo.sha()}", "commitOid": repo.sha()})


def is_large(name: str) -> bool:
    return f"/{name}".endswith(LARGE)


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET api/whoami-v2", "whoami"),
    ("POST api/repos/create", "create"),
    ("POST api/validate-yaml", "validate"),
    (rf"GET api/models/{NAME}", "info"),
    (rf"GET api/models/{NAME}/revision/(?P<revision>\w+)", "info"),
    (rf"GET api/models/{NAME}/auth-check(?P<write>/write)?", "auth_check"),
    (rf"GET api/models/{NAME}/tree/(?P<revision>\w+)(?:/(?P<folder>.*))?", "tree"),
    (rf"POST api/models/{NAME}/preupload/main", "preupload"),
    (rf"POST {NAME}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT lfs/(?P<oid>\w+)(?:/(?P<part>\d+))?", "put"),
    (r"POST lfs/(?P<oid>\w+)/done", "complete"),
    (rf"POST api/models/{NAME}/commit/main", "commit"),
    (rf"GET {NAME}/resolve/(?P<revision>\w+)/(?P<file>.+)", "resolve"),
]
