"""Programs that attack the sandbox or its tests: each scores 0, leaves nothing behind, and the next run goes on.

Run: pytest tests/test_sandbox_attacks.py
"""

import textwrap

import pytest
from sandbox_helpers import QUICK, TESTS, traces

from posttrain.sandbox import host, run_tests, sandbox_obstacle

pytestmark = pytest.mark.skipif(sandbox_obstacle() is not None, reason=f"no sandbox here: {sandbox_obstacle()}")

# ---- attacks: `double` is wrong, whatever else they do --------------------------------------------------------------

FORGE = """
import os, json
for fd in range(64):
    for text in ('{"passed": true, "reason": "passed", "share": 1.0, "nonce": ""}', '{"value": 4}'):
        try: os.write(fd, len(text).to_bytes(4, "big") + text.encode())
        except OSError: pass
"""
EQUAL = """
class Yes:
    __eq__ = __ne__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = lambda *a: True
    __hash__ = __len__ = __index__ = __int__ = lambda self: 4
    __bool__ = lambda self: True
"""
SEARCH = """
import gc, sys
def found(value, depth=0):
    if isinstance(value, str):
        return "".join(reversed("4 == )2(elbuod")) in value
    parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
    return isinstance(parts, (list, tuple)) and depth < 4 and any(found(part, depth + 1) for part in parts)
def double(x):
    frame, values = sys._getframe(), gc.get_objects()
    while frame:
        frame, values = frame.f_back, [*values, frame.f_locals, frame.f_globals]
    return 2 * x if any(found(value) for value in values) else 9
"""
ATTACKS = {
    "exit": "exit(0)",
    "exit in a call": "def double(x): raise SystemExit(0)",
    "_exit": "import os; os._exit(0)",
    "_exit in a call": "import os\ndef double(x): os._exit(0)",
    "equal to everything": f"{EQUAL}def double(x): return Yes()",
    "a number equal to everything": f"{EQUAL}class I(int):\n  __eq__ = lambda *a: True\ndef double(x): return I(9)",
    "in a list": f"{EQUAL}def double(x): return [Yes()]",
    "the function itself": f"{EQUAL}double = Yes()",
    "forged verdict": f"{FORGE}\ndef double(x): return 9",
    "forged verdict in a call": textwrap.indent(FORGE, "  ").join(["def double(x):\n", "\n  return 9"]),
    "patched builtins": "import builtins\nfor n in ('len', 'sorted', 'abs', 'AssertionError', 'isinstance'):\n"
    "  setattr(builtins, n, lambda *a: 4)\ndef double(x): return 9",
    "searching for the tests": SEARCH,
    "fork bomb": "import os\ntry:\n  while True: os.fork()\nexcept OSError: pass\ndef double(x): return 9",
    "thread bomb": "import threading, time\ntry:\n"
    "  while True: threading.Thread(target=time.sleep, args=[99]).start()\n"
    "except RuntimeError: pass\ndef double(x): return 9",
    "a gigabyte of print": "for _ in range(1000): print('x' * 2**20)\ndef double(x): return 2 * x",
    "a gigabyte in a call": "def double(x):\n  while True: print('x' * 2**20)",
    "memory": "x = bytearray(8 * 2**30)\ndef double(x): return 2 * x",
    "memory in steps": "x = []\nwhile True: x.append(bytearray(2**20))",
    "a huge result": "def double(x): return 'x' * (100 * 2**20)",
    "zip bomb": "import zlib\nd = b'0' * 2**20\nfor _ in range(9): d = zlib.compress(d * 900)\n",
    "a deep result": "def double(x):\n  r = []\n  for _ in range(10**5): r = [r]\n  return r",
    "full disk": "f = open('/tmp/a', 'wb')\nwhile True: f.write(bytes(2**20)); f.flush()",
    "many files": "for i in range(10**6): open(f'/tmp/{i}', 'w').close()",
    "endless loop": "while True: pass",
    "endless loop in a call": "def double(x):\n  while True: pass",
    "sleep": "import time\ndef double(x): time.sleep(60); return 4",
    "deaf to signals": "import signal, time\nfor s in (15, 2, 14): signal.signal(s, signal.SIG_IGN)\ntime.sleep(60)",
    "closed line": "import os, time\nos.closerange(0, 64)\ntime.sleep(60)",
    "grandchild": "import os, time\nif os.fork() == 0:\n  os.setsid()\n"
    "  if os.fork() == 0: time.sleep(60)\n  os._exit(0)\n"
    "def double(x): return 9",
    "kill all": "import os\nos.kill(-1, 9)\ndef double(x): return 9",
    "kill the group": "import os, signal\nos.kill(0, 9)\ndef double(x): return 9",
    "kill the parent": "import os\nfor pid in (os.getppid(), 1, *range(2, 3000)):\n  try: os.kill(pid, 9)\n"
    "  except OSError: pass\ndef double(x): return 9",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef double(x): return double(x)",
    "segmentation fault": "import ctypes\nctypes.string_at(0)",
    "abort": "import os\ndef double(x): os.abort()",
    "syntax error": "def double(x: return",
    "no such function": "x = 1",
    "empty": "",
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_scores_nothing_and_leaves_nothing(name):
    run_tests("def double(x): return 2 * x", TESTS)
    before = host.server().process.pid, traces()
    verdict = run_tests(ATTACKS[name], TESTS, limits=QUICK)
    assert not verdict.passed and verdict.reason not in ("", "passed", "no verdict")
    assert verdict.share == 0 and len(verdict.output) <= 256 * 1024
    assert (host.server().process.pid, traces()) == before
    assert run_tests("def double(x): return 2 * x", TESTS).passed


def test_reasons_are_named():
    def reason(name):
        return run_tests(ATTACKS[name], TESTS, limits=QUICK).reason

    assert reason("exit in a call") == "the program ended before its tests did: exit status 0"
    assert "no plain value" in reason("equal to everything")
    assert reason("sleep") == "time-out after 2 s" and reason("a gigabyte of print") == "more than 256 KB of output"
    assert reason("segmentation fault").endswith("killed by SIGSEGV")
    assert "MemoryError" in reason("memory") and reason("no such function").startswith("NameError")
    assert "never call" in run_tests("def double(x): return 4", "assert 1 + 1 == 2").reason


def test_tests_that_catch_everything_do_not_help_a_program_that_left():
    tests = "try:\n    double(2)\nexcept BaseException:\n    pass\n"
    assert run_tests("def double(x): return 4", tests).passed
    assert not run_tests("import os\ndef double(x): os._exit(0)", tests).passed


def test_helpers_of_the_statement_are_the_tests_own():
    """HumanEval 32, 38 and 50 judge by a function of the statement: redefining it must not help."""
    tests, helpers = "assert near(root(2), 4)", "def near(a, b): return abs(a - b) < 1e-6\n"
    cheat = "def near(a, b): return True\ndef root(x): return 99"
    assert not run_tests(cheat, tests, "root", helpers=helpers).passed
    assert run_tests("def root(x): return 4.0", tests, "root", helpers=helpers).passed
