"""Web pages for the tests of cleaning: WARC files made by warcio, English that passes FineWeb's rules.

In: a seed, or bodies and headers. Out: text, HTML, bytes of a WARC file.
"""

import gzip
import io
import random
import re

from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

NOUNS = """river garden teacher window mountain letter kitchen market morning harbour village engine forest winter
    painter bridge island doctor orchard lantern valley factory library journey station captain blanket candle meadow
    farmer theatre neighbour chimney bakery wagon violin castle carpenter shepherd notebook""".split()  # noqa: SIM905
VERBS = """found carried watched repaired painted remembered followed opened described visited measured borrowed sold
    noticed crossed admired planned forgot cleaned promised""".split()  # noqa: SIM905
KINDS = "old quiet narrow bright heavy wooden distant famous broken gentle empty crowded green frozen".split()  # noqa: SIM905
SHAPES = (
    "Every {k} {n} {v} the {n} because its {n} was {k}.", "Nobody {v} a {n} as {k} as this {n}, said the {n}.",
    "In summer my {n} {v} two {n}s with their {k} {n}.", "She {v} her {n} when we {v} that {k} {n}.",
    "After the {k} {n} they {v} one {n} and {v} another.", "What the {n} {v} would be {k} for any {n} of today.",
    "His {n}, which had {v} {n}s for years, {v} me to a {n}.", "You have {v} enough {k} {n}s; go home with your {n}.",
)  # fmt: skip


def sentence(pick: random.Random) -> str:
    words = {"k": KINDS, "n": NOUNS, "v": VERBS}
    return re.sub(r"\{(.)\}", lambda match: pick.choice(words[match[1]]), pick.choice(SHAPES))


def english(seed: int, sentences: int = 12) -> str:
    """Paragraphs of three sentences each; another seed, another text."""
    pick = random.Random(seed)
    made = [sentence(pick) for _ in range(sentences)]
    return "\n".join(" ".join(made[at : at + 3]) for at in range(0, sentences, 3))


def html(text: str, head: str = "") -> str:
    paragraphs = "".join(f"<p>{line}</p>\n" for line in text.splitlines())
    menu = "<nav><a href='/'>Home</a> <a href='/login'>Log in</a></nav>"
    body = f"<body>{menu}<article>{paragraphs}</article></body>"
    return f"<!DOCTYPE html><html><head>{head}<title>Page</title></head>{body}</html>"


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
