"""Untrusted Python, isolated: programs against their tests for the code reward, scripts for the python tool.

In: source text, `Limits`. Out: a `Verdict` or an `Output`. Nothing survives a run and nothing of the machine is seen:

    verdict = run_tests("def double(x): return 2 * x", "assert double(2) == 4")
    print(verdict.passed, verdict.reason)

Linux namespaces (user, mount, pid, net, ipc, uts, cgroup), a root of Python's libraries alone, read-only, 16 MB of
/tmp in memory, an empty environment, no capabilities, a filter of system calls, and limits on time, memory,
processes, files and output. Where the kernel refuses any of it, `sandbox_obstacle()` says what and nothing runs.

The launcher is our own: bubblewrap and nsjail have to be installed beside Python, set no limits (bubblewrap) or start
an interpreter a run; here a run is a fork of one that is up and behind its read-only root already (zygote.py).
"""

from posttrain.sandbox.host import Limits
from posttrain.sandbox.runs import Output, Verdict, run_python, run_tests, sandbox_obstacle

__all__ = ["Limits", "Output", "Verdict", "run_python", "run_tests", "sandbox_obstacle"]
