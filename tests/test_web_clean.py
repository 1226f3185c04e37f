"""The cleaning stage as users run it: planted duplicates and addresses, workers, kills, refusals, what comes next.

Run: pytest tests/test_web_clean.py
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import recipe_runs
import web_pages

from posttrain.data import DataConfig, files, load_rows
from posttrain.data.bad_rows import BadRows
from posttrain.data.web_config import QUALITY

RECIPE = recipe_runs.ROOT / "recipes" / "clean.py"
SETTINGS = ("--url_filter", "{use_integrated_lists: false, extra_domains: [blocked.com]}")
PAGES = 8  # of each file
FILES = 4


def clean(source, out: Path, *flags) -> subprocess.CompletedProcess:
    """In a process started warm."""
    logs = out.parent / f"{out.name}-logs"
    logs.mkdir(exist_ok=True)
    return recipe_runs.run([RECIPE, "--input", source, "--output_dir", out, *SETTINGS, *flags], logs)


def rows(folder: Path) -> list[dict]:
    return [row for _, row in files.read(sorted(folder.glob("clean-*.jsonl.zst")), BadRows(), 1_000_000)]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("clean-*")}


def result(folder: Path) -> dict:
    """Of the manifest, what must not depend on workers, kills and time."""
    found = recipe_runs.manifest(folder)
    cleaning = found["cleaning"]
    for step in cleaning["steps"]:
        del step["seconds"]
    return {"cleaning": cleaning, "files": found["files"], "metrics": found["metrics"], "data": found["data"]}


def near_copy(text: str, seed: int) -> str:
    """The same text with one word in eighty changed."""
    words, pick = text.split(" "), random.Random(seed)
    for at in range(pick.randrange(40), len(words), 80):
        words[at] = "different"
    return " ".join(words)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Four WARC files: 8 pages each; in file 1 a page of file 0 with few words changed, in file 2 an exact copy of one
    of file 1; in file 3 addresses, a German page, a short one, a page of a blocked domain and a damaged body."""
    folder = tmp_path_factory.mktemp("crawl")
    texts = [web_pages.english(seed, 40) for seed in range(FILES * PAGES)]
    texts[8] = near_copy(texts[0], 1)
    texts[17] = texts[9]
    texts[25] += (
        "\nWrite to jane.doe@firm.example.com, the server at 8.8.8.8 answers. Version 2.10.3 of 10.0.0.1 stays."
    )
    texts[26] = "Der Hund, den wir im Garten gesehen haben, gehört dem Nachbarn, der am Ende der Straße wohnt. " * 12
    texts[27] = web_pages.english(77, 4)
    for number in range(FILES):
        content = web_pages.crawl(texts[number * PAGES : number * PAGES + PAGES])
        if number == 3:
            page = web_pages.html(web_pages.english(99, 40)).encode()
            content += web_pages.record(page, "http://www.blocked.com/page")
            content += web_pages.record(b"\x1f\x8b broken", headers=[("Content-Encoding", "gzip")])
        (folder / f"{number}.warc.gz").write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def cleaned(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("clean") / "one"
    done = clean(source, out)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "datatrove.executor" not in done.stdout + done.stderr
    return out


def test_each_page_goes_for_the_reason_planted(cleaned):
    cleaning = recipe_runs.manifest(cleaned)["cleaning"]
    steps = {step["name"]: step for step in cleaning["steps"]}
    assert {name: step["dropped"] for name, step in steps.items() if step["dropped"]} == {
        "read": {"damaged_body": 1}, "url_filter": {"domain": 1}, "language_filter": {"de": 1},
        "gopher_quality": {"gopher_short_doc": 1}, "dedup": {"near_duplicate": 2},
    }  # fmt: skip
    assert steps["pii"]["also"] == {"emails": 1, "ips": 1}
    assert cleaning["read"] == 34 and cleaning["kept"] == 28 == len(rows(cleaned))
    names = list(steps)
    assert all(steps[a]["out"] == steps[b]["in"] for a, b in zip(names, names[1:], strict=False))
    assert "Der Hund" in steps["language_filter"]["samples"][0]["text"]
    assert steps["gopher_quality"]["samples"][0]["text"] == web_pages.english(77, 4)


def test_the_text_is_the_pages_main_text_with_addresses_masked(cleaned):
    kept = rows(cleaned)
    assert {row["url"] for row in kept} >= {"http://site0.example/page"} and all(
        row["language"] == "en" for row in kept
    )
    assert web_pages.english(3, 40) in [row["text"] for row in kept]  # no menu, every paragraph, in order
    masked = next(row["text"] for row in kept if "Version 2.10.3" in row["text"])
    assert "jane.doe" not in masked and "8.8.8.8" not in masked and "email@example.com" in masked
    assert "Version 2.10.3 of 10.0.0.1 stays." in masked  # three numbers are no address, a private one is nobody's


def test_later_stages_read_the_folder(cleaned):
    found, about = load_rows(DataConfig(dataset_name=str(cleaned)), "train", 0, ("text",))
    assert len(found) == 28 and about["skipped"] == {}
    assert sorted(path.name for path in cleaned.iterdir()) == [
        *(f"clean-0000{n}.jsonl.zst" for n in range(FILES)), "config.yaml", "datatrove", "stage.json",
    ]  # fmt: skip


@pytest.mark.slow
def test_four_workers_give_the_same_bytes(cleaned, source, tmp_path):
    out = ("--output_dir", tmp_path / "four")
    done = recipe_runs.call([sys.executable, RECIPE, "--input", source, *out, *SETTINGS, "--workers", 4])
    assert done.returncode == 0, done.stderr
    assert shards(tmp_path / "four") == shards(cleaned) and result(tmp_path / "four") == result(cleaned)


@pytest.mark.slow
def test_a_run_stopped_and_killed_gives_the_same_bytes(cleaned, source, tmp_path):
    """SIGTERM when a task of the first phase is done, which leaves no process; SIGKILL while the last phase runs."""
    out = tmp_path / "killed"
    arguments = [RECIPE, "--input", source, "--output_dir", out, *SETTINGS]
    running = recipe_runs.Running(arguments, tmp_path)
    wait_for(running, out / "datatrove/filter/completions")
    os.kill(running.pid, signal.SIGTERM)
    assert running.finish().returncode == 128 + signal.SIGTERM and gone(running.pid)
    torn = sorted({f"0000{task}" for task in range(FILES)} - {path.name for path in completed(out, "filter")})
    assert torn  # what a killed task leaves half written is not read
    (out / "work" / "filtered").mkdir(exist_ok=True)
    (out / "work" / "filtered" / f"{torn[-1]}.jsonl.zst").write_bytes(b"torn")
    running = recipe_runs.Running(arguments, tmp_path)
    wait_for(running, out / "datatrove/dedup/logs")
    os.killpg(running.pid, signal.SIGKILL)
    assert running.finish().returncode == -signal.SIGKILL
    assert len(completed(out, "filter")) == FILES and not (out / "stage.json").exists()
    done = clean(source, out)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout and shards(out) == shards(cleaned) and result(out) == result(cleaned)


def status(pid: int) -> list[str]:
    """State, parent, group, session, ... of a process."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def wait_for(running: recipe_runs.Running, folder: Path) -> None:
    """Until there is a file in it."""
    while not (folder.is_dir() and any(folder.iterdir())):
        assert status(running.pid)[0] != "Z", running.finish()
        time.sleep(0.002)


def gone(session: int) -> bool:
    """Whether all processes of a session end within seconds."""
    for _ in range(100):
        numbers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        found = []
        for number in numbers:
            try:
                found.append(int(status(number)[3]))
            except FileNotFoundError:
                continue
        if session not in found:
            return True
        time.sleep(0.1)
    return False


def completed(out: Path, phase: str) -> list[Path]:
    return list((out / "datatrove" / phase / "completions").iterdir())


def test_another_config_or_input_is_not_continued(cleaned, source, tmp_path):
    error = recipe_runs.refused(clean(source, cleaned, "--c4_quality", "false"), "another config", "c4_quality")
    assert "--overwrite true" in error
    assert "finished already" in clean(source, cleaned, "--workers", 3).stdout  # how many work at it does not matter
    shutil.copytree(source, tmp_path / "more")
    (tmp_path / "more" / "4.warc.gz").write_bytes(web_pages.crawl([web_pages.english(50, 40)]))
    recipe_runs.refused(clean(tmp_path / "more", cleaned), "another config", "data")


def test_steps_can_be_left_out_and_rows_are_text_already(tmp_path):
    path, out = tmp_path / "rows.jsonl", tmp_path / "out"
    texts = [web_pages.english(1, 40), web_pages.english(1, 40), web_pages.english(2) + " <b>Not</b> extracted."]
    lines = [json.dumps({"body": text, "rank": "../../../evil"}) for text in texts]
    path.write_text("\n".join([*lines, "{broken"]) + "\n")
    off = [word for name in ("language_filter", "gopher_quality", "c4_quality", "fineweb_quality", "dedup", "pii")
           for word in (f"--{name}", "false")]  # fmt: skip
    done = clean(path, out, "--text_column", "body", *off)
    assert done.returncode == 0, done.stderr
    assert [row["text"] for row in rows(out)] == texts
    found = recipe_runs.manifest(out)
    assert found["data"][0]["skipped"] == {"malformed_json": 1} and not list(tmp_path.glob("**/*evil*"))
    assert [step["name"] for step in found["cleaning"]["steps"]] == ["read", "url_filter", "gopher_repetition"]


FEW = [word for name in (*QUALITY[:3], "dedup", "pii") for word in (f"--{name}", "false")]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--gopher_quality", "{min_doc_wrods: 3}"), ("min_doc_wrods", "did you mean 'min_doc_words'?")),
        (("--gopher_quality", "{min_doc_words: many}"), ("min_doc_words", "many")),
        (
            (*FEW, "--fineweb_quality", "{line_punct_thr: 2.0}"),
            ("none is kept", "line_punct_ratio", "fineweb_quality: false"),
        ),
        ((*FEW, "--on_bad_row", "stop"), ("3.warc.gz, record 10", "damaged_body")),
        (("--executor", "slurm"), ("partition and time",)),
        (("--eval_labels", "nowhere.jsonl"), ("nowhere.jsonl", "text and label")),
        (("--workers", "0"), ("workers", "at least 1")),
    ],
)
def test_refusals(source, tmp_path, flags, words):
    recipe_runs.refused(clean(source / "3.warc.gz", tmp_path / "out", *flags), *words)


def test_one_process_starts_the_others(source, tmp_path):
    command = [sys.executable, RECIPE, "--input", source, "--output_dir", tmp_path / "out"]
    recipe_runs.refused(recipe_runs.call(command, WORLD_SIZE="2"), "--num_processes 1", "workers")


def test_inputs_that_do_not_fit(tmp_path):
    recipe_runs.refused(clean(tmp_path / "none*.warc.gz", tmp_path / "out"), "no file that ends in")
    (tmp_path / "a.html").write_text("<p>x</p>")
    (tmp_path / "b.jsonl").write_text("{}\n")
    recipe_runs.refused(clean(tmp_path, tmp_path / "out"), "several kinds", "1 html", "1 rows")


def test_two_runs_do_not_write_one_folder(source, tmp_path):
    from posttrain.data.web_run import hold
    from posttrain.errors import UserError

    script = "import sys; from pathlib import Path; from posttrain.data.web_run import hold\n"
    script += "hold(Path(sys.argv[1]), shared=True); print('held', flush=True); input()"
    command = [sys.executable, "-c", script, str(tmp_path / "lock")]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=recipe_runs.ROOT)
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="another run"):
        hold(tmp_path / "lock", shared=False)
    other.kill()
    other.wait()
    hold(tmp_path / "lock", shared=False)
