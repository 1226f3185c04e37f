"""Runs recipes in fresh processes that need not import torch again, which costs seconds: for tests of many short runs.

In: a JSON object a line on stdin, {"argv": [recipe, flag, ...], "env": {}, "out": file, "err": file} or {"wait": pid}.
Out: a number a line on stdout, the process's id or its exit code (-9: killed). Each run is a fork of this process with
a session of its own; the recipe runs in it as `__main__`. Used by tests/recipe_runs.py.
"""

import json
import os
import runpy
import sys
import traceback

import accelerate  # noqa: F401
import datasets  # noqa: F401
import trl
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, Trainer  # noqa: F401

import posttrain.rl.trainer  # noqa: F401

SFT_TRAINER = trl.SFTTrainer  # trl and transformers import their parts when they are first asked for


def run(argv: list[str], env: dict[str, str], out: str, err: str) -> None:
    """Become the recipe; never returns."""
    os.setsid()
    for file, descriptor, flags in (
        (os.devnull, 0, os.O_RDONLY),
        (out, 1, os.O_WRONLY | os.O_CREAT),
        (err, 2, os.O_WRONLY | os.O_CREAT),
    ):
        os.dup2(os.open(file, flags, 0o644), descriptor)
    os.environ.update(env)
    sys.argv = argv
    code = 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                run(**request)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
