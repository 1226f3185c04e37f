"""Web pages for the tests of cleaning: WARC files made by warcio, English that passes FineWeb's rules.

In: a seed, or bodies and headers. Out: text, HTML, bytes of a WARC file.
"""

import gzip
import io
import random

from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

NOUNS = "river garden teacher window mountain letter kitchen market morning harbour village engine forest".split()
VERBS = "found carried watched repaired painted remembered followed opened described visited measured".split()
PLACES = "near the old bridge|behind the school|at the end of the road|beside the quiet lake|in the north".split("|")


def sentence(pick: random.Random) -> str:
    words = [pick.choice(NOUNS), pick.choice(VERBS), pick.choice(NOUNS), pick.choice(PLACES), pick.choice(NOUNS)]
    return (
        f"The {words[0]} that we {words[1]} with the {words[2]} {words[3]} is older than any {words[4]} of the town."
    )


def english(seed: int, sentences: int = 12) -> str:
    """Paragraphs of three sentences each; another seed, another text."""
    pick = random.Random(seed)
    made = [sentence(pick) for _ in range(sentences)]
    return "\n".join(" ".join(made[at : at + 3]) for at in range(0, sentences, 3))


def html(text: str, head: str = "") -> str:
    paragraphs = "".join(f"<p>{line}</p>\n" for line in text.splitlines())
    menu = "<nav><a href='/'>Home</a> <a href='/login'>Log in</a></nav>"
    return f"<!DOCTYPE html><html><head>{head}<title>Page</title></head><body>{menu}<article>{paragraphs}</article></body></html>"


def record(
    body: bytes, url: str = "http://example.com/a", *, headers=(), kind: str = "text/html", packed=True
) -> bytes:
    """One response record, as a WARC file of its own; records can be put one after the other."""
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=packed)
    http = StatusAndHeaders("200 OK", [("Content-Type", kind), *headers], protocol="HTTP/1.1")
    writer.write_record(writer.create_warc_record(url, "response", payload=io.BytesIO(body), http_headers=http))
    return out.getvalue()


def crawl(texts: list[str], packed: bool = True) -> bytes:
    """A WARC file of one page a text."""
    return b"".join(
        record(html(text).encode(), f"http://site{number}.example/page", packed=packed)
        for number, text in enumerate(texts)
    )


def bomb(size: int) -> bytes:
    """`size` zero bytes, packed about a thousand to one."""
    return gzip.compress(b"\0" * size)
