"""Pages and rows as datatrove's documents, with bounded memory, and a reason for each that is refused.

In: the files of one kind, in order. Out: a datatrove step that yields the documents of its task's share, files
`rank::world_size`. Made by `web.py`; datatrove runs it in a worker.

A page's text is its HTML, decoded; a row's is its text. Of a row only text, id, url and date go on: datatrove fills
names of output files from a document's other columns, so that one called `rank` could write where it likes.
"""

import zlib
from collections.abc import Iterator
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from warcio.archiveiterator import ArchiveIterator
from warcio.bufferedreaders import ChunkedDataReader, DecompressingBufferedReader

from posttrain.data import files
from posttrain.data.bad_rows import BadRows
from posttrain.data.web_steps import Samples
from posttrain.errors import UserError

HTML = ("text/html", "application/xhtml+xml")
SNIFFED = 1024  # bytes in which a page of undeclared type must show that it is HTML
HEADER_BYTES = 1 << 20  # of one record's headers: a header without end is no page
GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS


class Refused(Exception):
    """A page that is left out: (reason, what was found and how to mend it)."""


class Reader(PipelineStep):
    """What the readers share: which files are a task's, and how what is refused is counted.

    Stats: `total` documents met, `forwarded`, `dropped` and `dropped_REASON`; `UTF-8`, ... by encoding.
    """

    type, name = "📖 - READER", "pages"

    def __init__(self, paths: list[str], policy: str, max_bytes: int, samples: Samples):
        super().__init__()
        self.paths, self.policy, self.max_bytes, self.samples = paths, policy, max_bytes, samples

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        bad = BadRows(self.policy)
        with self.samples as samples:

            def refuse(reason: str, message: str) -> None:
                bad(reason, message)
                self.stat_update("total", "dropped", f"dropped_{reason}")
                samples.write(Document(text=message, id="", metadata={"filter_reason": reason}), rank)

            for path in self.paths[rank::world_size]:
                for document in self.read(Path(path), refuse):
                    self.stat_update("total", "forwarded")
                    self.update_doc_stats(document)
                    yield document

    def read(self, path: Path, refuse) -> Iterator[Document]:
        raise NotImplementedError

    def page(self, content: bytes, charset: str | None, **facts) -> Document:
        """A page's document. Raises Refused where its bytes are in no known encoding."""
        text, encoding = decode(content, charset)
        self.stat_update(f"encoding_{encoding}")
        metadata = {key: facts[key] for key in ("url", "date") if facts.get(key)}
        return Document(text=text, id=facts["id"], metadata=metadata)


class HtmlPages(Reader):
    """One .html file, one page."""

    name = "🕷 HTML"

    def read(self, path: Path, refuse) -> Iterator[Document]:
        with open(path, "rb") as file:
            content = file.read(self.max_bytes + 1)
        try:
            if len(content) > self.max_bytes:
                raise Refused("too_long", f"more than {self.max_bytes:,} bytes; raise max_page_bytes")
            yield self.page(content, None, id=path.name)
        except Refused as refused:
            reason, message = refused.args
            refuse(reason, f"{path}: {message}")


class WarcPages(Reader):
    """The HTML responses of a WARC file; other records are passed over."""

    name = "🕷 WARC"

    def read(self, path: Path, refuse) -> Iterator[Document]:
        number, last, record = 0, "", None
        with open(path, "rb") as file:
            archive = ArchiveIterator(file)
            archive.reader = reader = BoundedHeaders(file)
            try:
                while (record := next_record(archive)) is not None:
                    number, last, document = number + 1, "", None
                    try:
                        document = self._document(record)
                    except Refused as refused:
                        last, message = refused.args
                        refuse(last, f"{path}, record {number}: {message}")
                    if document is not None:
                        yield document
                    cut, reader.headers_read, reader.unfinished = record.raw_stream, 0, False
                why = "" if reader.whole and not reader.unfinished and number else "it ends too early or is damaged"
                if number and getattr(cut, "limit", 1) > 0:
                    why = "it ends within that record"
            except Refused as refused:
                why = refused.args[1]
        if why and last not in ("truncated", "damaged_record"):  # cut off with its file: one fault, not two
            refuse("damaged_file", f"{path}: not readable after record {number}: {why}; fetch it again")

    def _document(self, record) -> Document | None:
        """The page of a record, None where it is none. Raises Refused."""
        if record.length is None:
            raise Refused("damaged_record", "no Content-Length")
        if record.rec_type != "response":
            return None
        headers, about = record.http_headers, record.rec_headers
        if headers is None and (about.get_header("WARC-Target-URI") or "").startswith("http"):
            raise Refused("damaged_record", "no HTTP response in it")
        declared = (headers and headers.get_header("Content-Type")) or ""
        found = about.get_header("WARC-Identified-Payload-Type") or declared.split(";")[0].strip().lower()
        if headers is None or (found and found not in HTML):
            return None
        if record.length > 2 * self.max_bytes:  # a chunk is read as a whole, so this bounds the memory
            raise Refused("too_long", f"a record of {record.length:,} bytes; raise max_page_bytes")
        content = self._payload(record, headers)
        if not found and not looks_like_html(content):
            return None
        facts = {"url": about.get_header("WARC-Target-URI"), "date": about.get_header("WARC-Date")}
        return self.page(content, charset_of(declared), id=about.get_header("WARC-Record-ID"), **facts)

    def _payload(self, record, headers) -> bytes:
        """The page's bytes: no more than `max_bytes` of them are ever unpacked."""
        raw = record.raw_stream
        chunked = (headers.get_header("Transfer-Encoding") or "").lower() == "chunked"
        stream = ChunkedDataReader(raw) if chunked else raw
        content = stream.read(self.max_bytes + 1)
        if len(content) > self.max_bytes:
            raise Refused("too_long", f"more than {self.max_bytes:,} bytes; raise max_page_bytes")
        if raw.limit > 0 and not raw.read(1):
            raise Refused("truncated", f"{raw.limit:,} bytes short of its Content-Length; fetch the file again")
        return unpack(content, (headers.get_header("Content-Encoding") or "").strip().lower(), self.max_bytes)


def next_record(archive: ArchiveIterator):
    """The next record, None at the end. Raises Refused for whatever warcio raises on bytes that are no record: its
    parser meets hostile files, and not all of its errors are of its own class."""
    try:
        record = next(archive, None)
        if record is not None and record.format != "warc":
            raise Refused("damaged_file", "no WARC record where one should begin")
        return record
    except Refused:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the file's
        said = str(error).strip().splitlines()
        raise Refused("damaged_file", said[0][:200] if said else type(error).__name__) from error


class BoundedHeaders(DecompressingBufferedReader):
    """warcio's reader, but header lines may not go on without end (pages are read by `read`). warcio takes what it
    cannot unpack and headers that break off for the end of the file: `whole` and `unfinished` tell them from it."""

    headers_read, whole, unfinished = 0, True, False

    def readline(self, length=None) -> bytes:
        left = HEADER_BYTES - self.headers_read
        line = super().readline(left if length is None else min(length, left))
        self.headers_read += len(line)
        self.unfinished |= bool(line.strip())
        if self.headers_read >= HEADER_BYTES:
            raise Refused("damaged_file", f"more than {HEADER_BYTES:,} bytes of headers")
        return line

    def close_decompressor(self) -> None:
        self.whole = self.decompressor is None or self.decompressor.eof
        super().close_decompressor()


def unpack(content: bytes, encoding: str, max_bytes: int) -> bytes:
    """A body as its Content-Encoding packed it; what is not packed, whatever its header says, stays as it is.

    Raises Refused for more than `max_bytes` bytes unpacked (a gzip bomb), a damaged body and an unknown encoding.
    """
    if encoding in ("", "identity"):
        return content
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise Refused("unknown_packing", f"Content-Encoding {encoding[:40]!r}, expected gzip, deflate or none")
    packed = content.startswith(b"\x1f\x8b") if "gzip" in encoding else True
    if not packed:
        return content  # Common Crawl and others store the body unpacked and keep the header
    for bits in (GZIP_OR_ZLIB, -zlib.MAX_WBITS):  # some servers send deflate without zlib's header
        unpacker = zlib.decompressobj(bits)
        try:
            found = unpacker.decompress(content, max_bytes + 1)
        except zlib.error as error:
            failed = error
            continue
        if len(found) > max_bytes:
            raise Refused("too_long", f"{len(content):,} bytes unpack to more than {max_bytes:,}; not unpacked")
        if not unpacker.eof:
            raise Refused("truncated", "its packed body ends too early; fetch the file again")
        return found
    raise Refused("damaged_body", f"its {encoding} body cannot be unpacked ({failed})")


def charset_of(content_type: str) -> str | None:
    from w3lib.encoding import http_content_type_encoding

    return http_content_type_encoding(content_type)


def looks_like_html(content: bytes) -> bool:
    start = content[:SNIFFED].lower()
    return any(mark in start for mark in (b"<html", b"<!doctype html", b"<head", b"<body"))


def decode(content: bytes, charset: str | None) -> tuple[str, str]:
    """(text, encoding) of a page: its byte order mark, else UTF-8 if it is that and more than ASCII, else what its
    HTTP header or its `meta` declares, else what charset_normalizer finds. NUL characters go, as in HTML5.

    UTF-8 is tried before the declared encoding, as in datatrove: text that is valid UTF-8 by chance is rare, pages
    that declare another are not. Raises Refused where nothing fits.
    """
    from w3lib.encoding import html_body_declared_encoding, read_bom, resolve_encoding

    marked, mark = read_bom(content)
    if marked:
        return content[len(mark) :].decode(marked, errors="replace").replace("\0", ""), marked
    declared = charset or html_body_declared_encoding(content)
    ascii_only = content.isascii()
    candidates = [] if ascii_only and declared else ["utf-8"]
    candidates += [name for name in [declared and resolve_encoding(declared)] if name]
    for name in candidates + ["utf-8"] * ascii_only:
        try:
            return content.decode(name).replace("\0", ""), name
        except UnicodeError:
            continue
    from charset_normalizer import from_bytes

    best = from_bytes(content).best()
    if best is None:
        raise Refused("unknown_encoding", f"bytes in no known encoding (declared: {declared or 'none'})")
    return str(best).replace("\0", ""), best.encoding


class Rows(Reader):
    """Rows of JSONL, JSON, text and Parquet files, as `posttrain.data.files` reads them anywhere else."""

    name = "📒 rows"

    def __init__(self, paths, policy, max_bytes, samples, text_column: str = "text", url_column: str = "url"):
        super().__init__(paths, policy, max_bytes, samples)
        self.text_column, self.url_column = text_column, url_column

    def read(self, path: Path, refuse) -> Iterator[Document]:
        try:
            for (prefix, number), row in files.read([path], refuse, self.max_bytes):
                fault = self._fault(row)
                if fault:
                    refuse(fault[0], f"{prefix}{number}: {fault[1]}")
                    continue
                found = {"url": row.get(self.url_column), "date": row.get("date")}
                metadata = {key: value for key, value in found.items() if isinstance(value, str) and value}
                yield Document(
                    text=row[self.text_column], id=str(row.get("id") or f"{path.name}/{number}"), metadata=metadata
                )
        except UserError as error:
            if self.policy == "stop":
                raise
            refuse("damaged_file", str(error))  # the other files are still read

    def _fault(self, row: dict) -> tuple[str, str] | None:
        if self.text_column not in row:
            return "missing_column", f"no column {self.text_column!r}; set text_column to one of {', '.join(row)}"
        text = row[self.text_column]
        if not isinstance(text, str):
            return "wrong_type", f"{self.text_column} is {type(text).__name__}, expected text"
        if not text.strip():
            return "empty_content", f"{self.text_column} is empty"
        if len(text) > self.max_bytes:
            return "too_long", f"more than {self.max_bytes:,} characters; raise max_page_bytes"
        if "\0" in text:
            return "nul", f"a NUL character after {text[: text.index(chr(0))][-40:]!r}"
        for value in (text, str(row.get("id")), str(row.get(self.url_column))):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                return "lone_surrogate", f"{value[error.start]!a} is half a surrogate pair, which no text may hold"
        return None
