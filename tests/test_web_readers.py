"""Pages and rows as documents: encodings, broken and cut-off files, bombs, each refused with its reason.

Run: pytest tests/test_web_readers.py
"""

import gzip
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import web_pages

from posttrain.data.web_readers import HtmlPages, Refused, Rows, WarcPages, decode, unpack
from posttrain.data.web_steps import Samples
from posttrain.errors import UserError


def read(
    tmp_path: Path, content: bytes, name="crawl.warc.gz", cls=WarcPages, policy="skip", max_bytes=1_000_000, **more
):
    """(documents, reasons of what was refused) of one file."""
    path = tmp_path / name
    path.write_bytes(content)
    step = cls([str(path)], policy, max_bytes, Samples(str(tmp_path / "samples"), "read", 3), **more)
    documents = list(step.run())
    counts = {key: int(step.stats[key].total) for key in step.stats.stats if key.startswith("dropped_")}
    assert step.stats["total"].total == len(documents) + sum(counts.values())
    return documents, {key.removeprefix("dropped_"): count for key, count in counts.items()}


# ---- encodings ------------------------------------------------------------------------------------------------------

RUSSIAN = "Съешь же ещё этих мягких французских булок, да выпей чаю. Широкая электрификация южных губерний."
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所で泣いていた。"
FRENCH = "Voix ambiguë d'un cœur qui, au zéphyr, préfère les jattes de kiwis. Où l'élève a-t-il caché ça\xa0?"


ENCODED = [
    (RUSSIAN, "utf-8"), (RUSSIAN, "windows-1251"), (RUSSIAN, "koi8-r"), (JAPANESE, "shift_jis"),
    (JAPANESE, "euc-jp"), (JAPANESE, "iso-2022-jp"), (FRENCH, "windows-1252"), (FRENCH.replace("œ", "oe"), "latin-1"),
    (FRENCH, "utf-16"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "encoding", "declared"),
    [(*each, declared) for each in ENCODED for declared in ("header", "meta")]
    + [(*each, "wrong") for each in ENCODED if each[1] in ("utf-8", "utf-16")],
)
def test_declared_encodings(tmp_path, text, encoding, declared):
    """`wrong`: the header says another one, which only UTF-8 and a byte order mark can overrule."""
    kind = {"header": f"text/html; charset={encoding}", "wrong": "text/html; charset=koi8-r"}.get(
        declared, "text/html"
    )
    head = f'<meta charset="{encoding}">' if declared == "meta" else ""
    documents, refused = read(tmp_path, web_pages.record(web_pages.html(text, head).encode(encoding), kind=kind))
    assert refused == {} and text in documents[0].text


@pytest.mark.parametrize(
    ("text", "encoding"), [(RUSSIAN, "windows-1251"), (JAPANESE, "shift_jis"), (RUSSIAN, "utf-8")]
)
def test_undeclared_encodings_are_found(text, encoding):
    assert text in decode(web_pages.html(text * 5).encode(encoding), None)[0]


def test_marks_and_nul_characters():
    assert decode(b"\xef\xbb\xbfna\xc3\xafve", "latin-1") == ("naïve", "utf-8")
    assert decode(b"a\0b\0", None)[0] == "ab"


# ---- WARC files -----------------------------------------------------------------------------------------------------


def test_only_html_responses_are_pages(tmp_path):
    page = web_pages.html("Some text of a page.").encode()
    parts = [
        web_pages.record(page, "http://a.example/"),
        web_pages.record(b"%PDF-1.4 ...", "http://b.example/", kind="application/pdf"),
        web_pages.record(page, "http://c.example/", kind="application/xhtml+xml; charset=utf-8"),
        web_pages.record(page, "http://d.example/", kind=""),
        web_pages.record(b"\x89PNG....", "http://e.example/", kind=""),
    ]
    documents, refused = read(tmp_path, b"".join(parts))
    assert [document.metadata["url"][7] for document in documents] == ["a", "c", "d"] and refused == {}
    assert all(document.id.startswith("<urn:uuid:") and document.metadata["date"] for document in documents)


@pytest.mark.parametrize("packed", [True, False])
def test_a_file_cut_off_anywhere_gives_its_whole_pages_and_one_refusal(tmp_path, packed):
    """A page is whole before its record's last line ends (plain) and before gzip's check sum."""
    records = [web_pages.record(web_pages.html(web_pages.english(n)).encode(), packed=packed) for n in range(3)]
    whole, ends = b"".join(records), [sum(map(len, records[:n])) for n in range(4)]
    for cut in [*range(1, ends[1], 7 if packed else 13), *range(ends[1] + 1, len(whole), 41), *ends[1:]]:
        documents, refused = read(tmp_path, whole[:cut], name="cut.warc" + ".gz" * packed)
        least, most = sum(end <= cut for end in ends[1:]), sum(end - 16 <= cut for end in ends[1:])
        assert least <= len(documents) <= most, (cut, ends, refused)
        if least == most:
            assert sum(refused.values()) == (cut not in ends), (cut, ends, refused)


def test_a_damaged_member_ends_its_file_with_a_reason(tmp_path):
    records = [web_pages.record(web_pages.html(web_pages.english(n, 60)).encode()) for n in range(3)]
    damaged = bytearray(records[1])
    damaged[600:640] = bytes(40)
    documents, refused = read(tmp_path, records[0] + bytes(damaged) + records[2])
    assert len(documents) >= 1 and sum(refused.values()) >= 1 and set(refused) <= {"truncated", "damaged_file"}
    with pytest.raises(UserError, match=r"crawl.warc.gz.*record"):
        read(tmp_path, records[0] + bytes(damaged) + records[2], policy="stop")


def test_what_is_no_warc_file_is_refused(tmp_path):
    assert read(tmp_path, b"PK\x03\x04 no archive" * 100) == ([], {"damaged_file": 1})
    assert read(tmp_path, gzip.compress(b"hello\n" * 100)) == ([], {"damaged_file": 1})


def test_bodies_packed_and_in_chunks(tmp_path):
    page = web_pages.html("Some text of a page.").encode()
    packed = gzip.compress(page)
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (packed[:40], packed[40:], b""))
    gz = ("Content-Encoding", "gzip")
    for body, headers in [
        (packed, [gz]), (chunked, [gz, ("Transfer-Encoding", "chunked")]), (page, [gz]),
        (page, [("Transfer-Encoding", "chunked")]),
    ]:  # fmt: skip
        documents, refused = read(tmp_path, web_pages.record(body, headers=headers))
        assert [document.text for document in documents] == [page.decode()] and refused == {}
    assert read(tmp_path, web_pages.record(packed[:-20], headers=[gz])) == ([], {"truncated": 1})
    assert read(tmp_path, web_pages.record(page, headers=[("Content-Encoding", "br")])) == ([], {"unknown_packing": 1})


def test_deflate_with_and_without_its_header():
    import zlib

    raw = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    assert unpack(zlib.compress(b"text" * 9), "deflate", 100) == b"text" * 9
    assert unpack(raw.compress(b"text" * 9) + raw.flush(), "deflate", 100) == b"text" * 9
    with pytest.raises(Refused, match="damaged_body"):
        unpack(b"no deflate at all", "deflate", 100)


BOMB = """
import resource, sys, time
sys.path[:0] = [{tests!r}]
import web_pages
from pathlib import Path
from posttrain.data.web_readers import WarcPages
from posttrain.data.web_steps import Samples

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step = WarcPages([sys.argv[1]], "skip", 1_000_000, Samples("/nowhere", "read", 0))
print(sum(1 for _ in step.run()), step.stats["dropped_too_long"].total, step.stats["dropped_damaged_file"].total)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, file=sys.stderr)
"""


@pytest.mark.parametrize("kind", ["body", "body in chunks", "record", "header", "after the record"])
def test_bombs_are_refused_in_bounded_memory(tmp_path, kind):
    """150 MB of zeros, packed to 0.15 MB, in each place where a reader could unpack them."""
    size, page = 150_000_000, web_pages.html("Some text of a page.").encode()
    packed = web_pages.bomb(size)
    gz, chunks = ("Content-Encoding", "gzip"), ("Transfer-Encoding", "chunked")
    if kind == "body":
        content = web_pages.record(packed, headers=[gz])
    elif kind == "body in chunks":
        content = web_pages.record(b"%x\r\n%s\r\n0\r\n\r\n" % (len(packed), packed), headers=[gz, chunks])
    else:
        plain = web_pages.record(b"<html>", packed=False)
        head, _, rest = plain.partition(b"Content-Length: ")
        length, _, rest = rest.partition(b"\r\n")
        start, _, _ = rest.partition(b"<html>")
        stated = size + int(length) if kind != "after the record" else int(length)
        header = start[: start.rindex(b"\r\n\r\n")] + b"\r\nX-Long: " if kind == "header" else start
        front = head + b"Content-Length: %d\r\n" % stated + header + b"<html>" * (kind == "after the record")
        content = join_gzip(front, size)
    path = tmp_path / "bomb.warc.gz"
    path.write_bytes(web_pages.record(page) + content + web_pages.record(page))
    script = BOMB.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    documents, too_long, damaged = map(int, done.stdout.split())
    assert too_long + damaged == 1 and documents >= 1, done.stdout
    assert int(done.stderr.split()[-1]) < 60_000, done.stderr  # kB; 150,000 would be all of it


def join_gzip(front: bytes, zeros: int) -> bytes:
    """One gzip member: `front`, then so many zeros."""
    import zlib

    packer = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    out = [packer.compress(front)]
    out += [packer.compress(bytes(1_000_000)) for _ in range(zeros // 1_000_000)]
    return b"".join([*out, packer.flush()])


# ---- HTML files and rows --------------------------------------------------------------------------------------------


def test_html_files(tmp_path):
    documents, refused = read(tmp_path, web_pages.html(RUSSIAN).encode("utf-8"), "a.html", HtmlPages)
    assert RUSSIAN in documents[0].text and documents[0].id == "a.html" and refused == {}
    assert read(tmp_path, b"<p>" * 400_000, "b.html", HtmlPages) == ([], {"too_long": 1})


def test_rows_and_what_is_wrong_with_them(tmp_path):
    lines = [
        json.dumps({"text": "fine", "url": "http://a.example/", "id": 7, "rank": "../../x", "date": "2024"}),
        "{broken", json.dumps({"content": "x"}), json.dumps({"text": 5}), json.dumps({"text": "  "}),
        json.dumps({"text": "a\0b"}), '{"text": "half \\ud800 pair"}', json.dumps({"text": "x" * 2000}),
        json.dumps({"text": "fine again"}),
    ]  # fmt: skip
    content = "\r\n".join(lines).encode() + b'\r\n{"text": "caf\xe9"}\n'
    documents, refused = read(tmp_path, b"\xef\xbb\xbf" + content, "rows.jsonl", Rows, max_bytes=1000)
    assert [document.text for document in documents] == ["fine", "fine again"]
    assert documents[0].id == "7" and documents[0].metadata == {"url": "http://a.example/", "date": "2024"}
    assert refused == {
        "malformed_json": 1, "missing_column": 1, "wrong_type": 1, "empty_content": 1, "nul": 1, "lone_surrogate": 1,
        "too_long": 1, "invalid_utf8": 1,
    }  # fmt: skip
    with pytest.raises(UserError, match=r"rows.jsonl:2: not valid JSON"):
        read(tmp_path, content, "rows.jsonl", Rows, policy="stop")


def test_rows_of_parquet_and_packed_jsonl(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"text": RUSSIAN, "url": "http://a.example/", "n": 1}, {"text": "", "url": None, "n": 2}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "made.parquet")
    packed = pyarrow.compress("".join(json.dumps(row) + "\n" for row in rows).encode(), "zstd", asbytes=True)
    for name, content in (("rows.parquet", (tmp_path / "made.parquet").read_bytes()), ("rows.jsonl.zst", packed)):
        documents, refused = read(tmp_path, content, name, Rows)
        assert [document.text for document in documents] == [RUSSIAN] and refused == {"empty_content": 1}
        assert documents[0].metadata == {"url": "http://a.example/"} and documents[0].id.startswith(f"{name}/")


def test_a_huge_row_is_read_past_in_bounded_memory(tmp_path):
    path = tmp_path / "rows.jsonl"
    with open(path, "wb") as file:
        file.write(b'{"text": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n{"text": "fine"}\n')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = Rows([str(path)], "skip", 1_000_000, Samples(str(tmp_path), "read", 1))
    assert [document.text for document in step.run()] == ["fine"] and step.stats["dropped_too_long"].total == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000


def test_a_cut_off_file_of_rows_is_counted_or_stops(tmp_path):
    content = gzip.compress(b"".join(b'{"text": "%d"}\n' % n**9 for n in range(9000)))[:-30]
    documents, refused = read(tmp_path, content, "rows.jsonl.gz", Rows)
    assert len(documents) > 0 and refused == {"damaged_file": 1}
    with pytest.raises(UserError, match="damaged or cut-off gzip file"):
        read(tmp_path, content, "rows.jsonl.gz", Rows, policy="stop")
