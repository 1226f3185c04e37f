"""The embedded default chain in full, as `make demo` runs it: every gain is to be shown. About ten minutes.

Run: pytest -s tests/test_demo.py (-s shows the stages and the table of gains while it runs)
"""

import os
import resource
import subprocess
import sys

import pytest
from recipe_runs import ROOT, STAGES, manifest

GIB = 2**20  # in the KiB of ru_maxrss


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(1500)
def test_every_stage_of_the_tiny_chain_shows_its_gain(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    out = tmp_path / "tiny"
    command = [sys.executable, "-m", "posttrain.cli", "run", "recipes/tiny", "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    env.pop("OMP_NUM_THREADS", None)  # as a user has it: all cores
    done = subprocess.run(command, cwd=ROOT, env=env)
    assert done.returncode == 0
    found = {stage: manifest(out / stage) for stage in STAGES}
    missed = [
        f"{stage}: {gain['name']}: {gain['before']['value']:.3f} -> {gain['after']['value']:.3f}, goal {gain['goal']}"
        for stage in STAGES
        for gain in found[stage]["gains"]
        if not gain["passed"]
    ]
    assert not missed, "\n".join(missed)
    assert all(found[stage]["gains"] for stage in STAGES[1:])
    assert all(found[stage]["engine"].startswith("vllm ") for stage in ("sft", "ppo", "grpo"))
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 6 * GIB, "a stage took more than 6 GiB"
