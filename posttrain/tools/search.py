"""The search tool that a model may call. In: a query. Out: the passages that fit it best, one after another.

    tools: [search]
    tool_options: {search: {folder: docs, num_results: 3}}            # BM25 over the texts of a folder
    tool_options: {search: {url: "http://127.0.0.1:8888/search?format=json"}}     # or any endpoint that answers JSON

A folder's `.txt` and `.md` files and `.jsonl` files with `text` (and `title`, where a row has one) are cut at ends of
sentences into passages of at most `max_chars` characters. The index is built once, when a model is given the tool or
at the first search (BM25 of Robertson et al. as Lucene has it, by bm25s; words of English that stand everywhere are
left out). An endpoint gets the query as `query_key` of a GET request. Read are SearXNG's answers ({"results": [...]})
and plain lists, of texts or of objects with a text under one of TEXT_KEYS, and a `title` where they have one.
"""

import json
import re
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from posttrain.errors import UserError

SUFFIXES = (".txt", ".md", ".jsonl")
TEXT_KEYS = ("content", "text", "snippet", "description")
MOST_BYTES = 2_000_000  # of an endpoint's answer
NOTHING = "nothing found"
_BUILDING = threading.Lock()


@dataclass(frozen=True)
class SearchOptions:
    """`folder` or `url`; `timeout`: seconds that the endpoint has for one answer."""

    folder: str | None = None
    url: str | None = None
    query_key: str = "q"
    num_results: int = 3
    max_chars: int = 300
    timeout: float = 10.0

    def __post_init__(self):
        if (self.folder is None) == (self.url is None):
            found = "neither" if self.folder is None else "both"
            raise UserError(f"folder, url: found {found}, expected one of them: where to search")
        for key, kind in {"folder": str, "url": str, "query_key": str}.items():
            value = getattr(self, key)
            if value is not None and (not isinstance(value, kind) or not value):
                raise UserError(f"{key}: found {value!r}, expected some text")
        for key, least in {"num_results": 1, "max_chars": 20}.items():
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"{key}: found {value!r}, expected a whole number of at least {least}")
        if isinstance(self.timeout, bool) or not isinstance(self.timeout, (int, float)) or not self.timeout > 0:
            raise UserError(f"timeout: found {self.timeout!r}, expected seconds above 0")
        if self.url is not None and not re.match(r"https?://[^/]", self.url):
            raise UserError(f"url: found {self.url!r}, expected http://... or https://...")


def search_tool(options: SearchOptions) -> tuple[Callable[[str], str], Callable[[], object]]:
    """(the tool's function, what makes it ready: builds the index, or asks the endpoint). UserError for a folder
    without texts, and when it is made ready for a file that cannot be read or an endpoint that does not answer."""
    look, require = _folder_search(options) if options.url is None else _endpoint_search(options)

    def search(query: str) -> str:
        """
        Searches documents and returns the passages that fit the query best.

        Args:
            query: Words to look for.
        """
        return look(query)

    return search, require


# ---- a folder -------------------------------------------------------------------------------------------------------


def _folder_search(options: SearchOptions) -> tuple[Callable[[str], str], Callable[[], "Index"]]:
    folder = Path(options.folder)
    if not folder.is_dir():
        raise UserError(f"tool_options: search: folder: no folder {options.folder!r}; expected one with documents")
    files = sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file() and p.stat().st_size)
    if not files:
        raise UserError(
            f"tool_options: search: folder: {options.folder} has no text; expected files of {', '.join(SUFFIXES)}"
        )
    seen = tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)

    def index() -> Index:
        with _BUILDING:  # calls come side by side
            return _index(seen, options.max_chars)

    def look(query: str) -> str:
        return "\n".join(index().best(query, options.num_results)) or NOTHING

    return look, index


class Index:
    """BM25 over passages; UserError where bm25s is not installed."""

    def __init__(self, passages: list[str]):
        bm25s = _bm25s()
        self.passages, self.tokenize = passages, bm25s.tokenize
        self.scores = bm25s.BM25(backend="numpy")
        self.scores.index(self.tokenize(passages, show_progress=False), show_progress=False)

    def best(self, query: str, num: int) -> list[str]:
        """The passages that score highest, of equal ones the first; none that shares no word with the query."""
        words = self.tokenize([query], return_ids=False, show_progress=False)[0]
        if not words or not self.scores.get_tokens_ids(words):
            return []
        scores = self.scores.get_scores(words)
        order = (-scores).argsort(kind="stable")[:num]
        return [self.passages[place] for place in order if scores[place] > 0]


def _bm25s():
    """The library without numba, which it imports where that is installed though numpy is all that is used here.

    That would cost seconds, and vLLM 0.31 cannot be started behind it: it looks through the attributes of all loaded
    modules and dies at one of numba's llvmlite, whose `__dict__` is a function.
    """
    loaded = sys.modules.get("numba", sys)  # None would say that it cannot be imported
    if loaded is sys:
        sys.modules["numba"] = None
    try:
        import bm25s
    except ImportError as error:
        raise UserError("the search tool needs bm25s: pip install 'posttrain[search]'") from error
    finally:
        if loaded is sys:
            del sys.modules["numba"]
    return bm25s


@lru_cache(maxsize=4)
def _index(files: tuple[tuple[str, int, int], ...], max_chars: int) -> Index:
    texts = (text for path, *_ in files for text in read_texts(Path(path)))
    return Index([passage for title, text in texts for passage in passages(title, text, max_chars)])


def read_texts(path: Path) -> Iterator[tuple[str, str]]:
    """(title or "", text) of a text file or of each row of a JSONL file. UserError names file and line."""
    try:
        whole = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"search: {path} is no UTF-8 text: {error}") from error
    if path.suffix != ".jsonl":
        yield "", whole
        return
    for number, line in enumerate(whole.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"search: {path}:{number}: no JSON ({error})") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UserError(f"search: {path}:{number}: found {line[:60]!r}, expected an object with 'text'")
        yield str(row.get("title") or ""), row["text"]


def passages(title: str, text: str, most: int) -> list[str]:
    """The text in pieces of whole sentences, of at most `most` characters each where no sentence is longer; longer
    ones are cut between words. Each begins with the title, which does not count."""
    sentences = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", text)]
    pieces = [piece for sentence in sentences for piece in textwrap.wrap(sentence, most)]
    found: list[str] = []
    for piece in pieces:
        if found and len(found[-1]) + 1 + len(piece) <= most:
            found[-1] += f" {piece}"
        else:
            found.append(piece)
    return [f"{title}: {piece}" if title else piece for piece in found]


# ---- an endpoint ----------------------------------------------------------------------------------------------------


def _endpoint_search(options: SearchOptions) -> tuple[Callable[[str], str], Callable[[], None]]:
    def require() -> None:
        first = _answer(options.url, options, "test")
        if isinstance(first, str):
            raise UserError(f"tool_options: search: url: {options.url}: {first}; start the endpoint or mend the URL")

    def look(query: str) -> str:
        found = _answer(options.url, options, query)
        if isinstance(found, str):
            return f"error: the search failed: {found}"
        return "\n".join(found[: options.num_results]) or NOTHING

    return look, require


def _answer(url: str, options: SearchOptions, query: str) -> list[str] | str:
    """The results as texts, or what went wrong."""
    import httpx

    deadline, body = time.monotonic() + options.timeout, b""
    try:
        whole = httpx.URL(url).copy_merge_params({options.query_key: query})
        with httpx.stream("GET", whole, timeout=options.timeout, headers={"Accept": "application/json"}) as response:
            if response.status_code != 200:
                return f"HTTP {response.status_code}, expected 200"
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > MOST_BYTES:
                    return f"an answer of more than {MOST_BYTES:,} bytes"
                if time.monotonic() > deadline:
                    return f"no whole answer within {options.timeout:g} s"
        results = results_of(json.loads(body))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"{type(error).__name__}: {error}"
    except (ValueError, RecursionError) as error:
        return f"no JSON ({error})"
    if results is None:
        return 'an answer that is neither a list nor {"results": [...]}, of texts or of objects with a text'
    return [textwrap.shorten(text, options.max_chars, placeholder=" ...") for text in results]


def results_of(value) -> list[str] | None:
    """The texts of an answer's results; None where it has another layout."""
    listed = value.get("results") if isinstance(value, dict) else value
    if not isinstance(listed, list):
        return None
    found = []
    for each in listed:
        if isinstance(each, dict):
            text = next((each[key] for key in TEXT_KEYS if isinstance(each.get(key), str) and each[key]), None)
            title = each.get("title")
            each = text if not isinstance(title, str) or not title else f"{title}: {text}" if text else title
        if not isinstance(each, str):
            return None
        found.append(each)
    return found
