"""Cleaning on Slurm and Ray: datatrove's executors, Slurm's four commands played by scripts that run a job at once.

Run: pytest tests/test_web_executors.py
"""

import json
import os
import stat
import sys
from pathlib import Path

import pytest
import web_pages

from posttrain.data import web, web_run
from posttrain.data.web_config import StepsConfig, WebConfig
from posttrain.errors import UserError

SBATCH = """#!/bin/bash
# Runs each task of the array, in order; the merge of stats, which depends on it, is left out.
for word in "$@"; do case $word in --export=*) export ${word#--export=ALL,};; esac; done
script="${@: -1}"; cp "$script" "$SLURM_STUB/script.$(ls $SLURM_STUB | wc -l)"
if ! grep -q dependency= "$script"; then
  last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
  for task in $(seq 0 "$last"); do
    [ "$task" = "$SLURM_STUB_LOST" ] || SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=node1 bash "$script" >&2
  done
fi
echo "Submitted batch job 42"
"""
COMMANDS = {
    "sbatch": SBATCH,
    "srun": '#!/bin/bash\nwhile [ "$1" != launch_pickled_pipeline ]; do shift; done\nexec "$@"\n',
    "squeue": "#!/bin/bash\n[ ! -e $SLURM_STUB/queued ] || { rm $SLURM_STUB/queued; echo '42 cpu clean-filter'; }\n",
    "scontrol": "#!/bin/bash\necho node1\n",
}
NO_SPACY = dict.fromkeys(("url_filter", "gopher_repetition", "gopher_quality", "c4_quality", "dedup"), False)


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """A folder with the scripts it was given; its commands come first on PATH."""
    commands, seen = tmp_path / "bin", tmp_path / "seen"
    commands.mkdir()
    seen.mkdir()
    for name, text in COMMANDS.items():
        (commands / name).write_text(text)
        (commands / name).chmod(stat.S_IRWXU)
    path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
    root = str(Path(__file__).parents[1])
    for key, value in {"PATH": path, "SLURM_STUB": str(seen), "SLURM_STUB_LOST": "", "PYTHONPATH": root}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(web_run, "QUEUE_SECONDS", 0.01)
    return seen


@pytest.fixture
def crawl(tmp_path) -> list[Path]:
    paths = [tmp_path / f"{number}.warc.gz" for number in range(2)]
    for number, path in enumerate(paths):
        path.write_bytes(web_pages.crawl([web_pages.english(seed, 12) for seed in (number, number + 10)]))
    return paths


def run(paths: list[Path], out: Path, executor: str, **options) -> list[bytes]:
    config = WebConfig(str(paths[0].parent / "*.warc.gz"), executor=executor, **options)
    (out / "datatrove").mkdir(parents=True, exist_ok=True)
    for phase in web.phases(config, StepsConfig(**NO_SPACY), "warc", paths, out):
        web_run.run(phase, config, out)
    return [path.read_bytes() for path in sorted((out / "work/clean").iterdir())]


KEYS = {"slurm": {"partition": "cpu", "time": "01:00:00", "qos": "long", "mem_per_cpu_gb": 4}}


def test_slurm_gives_the_same_bytes_after_a_lost_task_too(slurm, crawl, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_STUB_LOST", "1")
    with pytest.raises(UserError, match=r"1 of 2 tasks did not complete, the first is task 1.*run the same command"):
        run(crawl, tmp_path / "slurm", "slurm", **KEYS)
    script = (slurm / "script.0").read_text()
    for line in ("--partition=cpu", "--time=01:00:00", "--qos=long", "--mem-per-cpu=4G", "--array=0-1%1"):
        assert f"#SBATCH {line}\n" in script
    monkeypatch.setenv("SLURM_STUB_LOST", "")
    assert run(crawl, tmp_path / "slurm", "slurm", **KEYS) == run(crawl, tmp_path / "local", "local")
    assert json.loads((tmp_path / "slurm/datatrove/filter/ranks_to_run.json").read_text()) == [1]


def test_jobs_that_are_still_queued_are_not_submitted_again(slurm, crawl, tmp_path):
    first = tmp_path / "out/datatrove/filter"
    first.mkdir(parents=True)
    (first / web_run.JOB).write_text("42")
    (slurm / "queued").touch()
    with pytest.raises(UserError, match="2 of 2 tasks did not complete"):  # they left the queue and did nothing
        run(crawl, tmp_path / "out", "slurm", **KEYS)
    assert list(slurm.iterdir()) == []


def test_what_slurm_refuses_is_said(slurm, crawl, tmp_path):
    (slurm.parent / "bin/sbatch").write_text("#!/bin/bash\necho 'invalid partition' >&2; exit 1\n")
    with pytest.raises(UserError, match="executor slurm: .*sbatch.*output.log"):
        run(crawl, tmp_path / "out", "slurm", **KEYS)
    assert "invalid partition" in (tmp_path / "out/datatrove/output.log").read_text()
    with pytest.raises(UserError, match="slurm: does not take 'partitoin'; did you mean 'partition'"):
        run(crawl, tmp_path / "other", "slurm", slurm={**KEYS["slurm"], "partitoin": "x"})


def test_a_task_that_fails_is_named_with_its_error(slurm, crawl, tmp_path):
    crawl[1].write_bytes(b"no archive")
    with pytest.raises(UserError, match=r"the first is task 1: .*UserError.*1.warc.gz"):
        run(crawl, tmp_path / "out", "slurm", on_bad_row="stop", **KEYS)


@pytest.mark.slow
def test_ray_gives_the_same_bytes(crawl, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    config = WebConfig("x", executor="ray", workers=2)
    web_run.start_ray(config)
    try:
        found = run(crawl, tmp_path / "ray", "ray", workers=2, ray={"mem_per_cpu_gb": 0.1})
        assert found == run(crawl, tmp_path / "local", "local")
        crawl[1].write_bytes(b"no archive")
        with pytest.raises(UserError, match=r"the first is task 1: .*UserError.*1.warc.gz"):
            run(crawl, tmp_path / "bad", "ray", on_bad_row="stop", ray={"mem_per_cpu_gb": 0.1})
    finally:
        ray.shutdown()
