"""Untrusted code in its sandbox: what honest code may do, what no code can see or reach, what dies with the trainer.

Run: POSTTRAIN_REAL_DATA=folder pytest tests/test_sandbox.py
"""

import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sandbox_helpers import QUICK, TESTS, traces

from posttrain.data.code import humaneval
from posttrain.sandbox import Limits, host, run_python, run_tests, sandbox_obstacle

pytestmark = pytest.mark.skipif(sandbox_obstacle() is not None, reason=f"no sandbox here: {sandbox_obstacle()}")
SECRET = "hf_secret_token_0123456789"


# ---- honest code ----------------------------------------------------------------------------------------------------


def test_right_and_wrong_programs():
    right = run_tests("def double(x): return 2 * x", TESTS)
    assert (right.passed, right.reason, right.share) == (True, "passed", 1.0)
    wrong = run_tests("def double(x): return 4", TESTS)
    assert not wrong.passed and wrong.reason == "AssertionError in line 2 of the tests: assert double(0) == 0"
    assert wrong.share == 0.0


def test_asserts_are_counted_one_by_one_on_demand():
    tests = (
        "def check(f):\n    assert True\n    for x in range(3):\n        assert f(x) == 2 * x\n    assert f(5) == 10\n"
    )
    programs = {"lambda x: 2 * x": 1.0, "lambda x: 10 if x == 5 else 0": 0.5, "lambda x: 0": 0.0, "None": 0.0}
    for body, share in programs.items():
        verdict = run_tests(f"double = {body}", f"{tests}check(double)\n", every_assert=True)
        assert (verdict.share, verdict.passed) == (share, share == 1.0), verdict
    left = run_tests(
        "import os\ndef double(x):\n  if x == 5: os._exit(0)\n  return 2 * x",
        tests + "check(double)",
        every_assert=True,
    )
    assert (left.share, left.passed) == (0.5, False)


VALUES = """[None, True, 7, -(2**70), 1.5, float("inf"), -0.0, 2+3j, "a\\ud800\\n", b"x", bytearray(b"y"), (1, [2]),
{"a": {1, 2}, 3: frozenset([4])}, range(1, 9, 2), collections.deque([1], 3), collections.Counter("aab"),
collections.OrderedDict(b=1, a=2), decimal.Decimal("1.10"), fractions.Fraction(1, 3), datetime.timedelta(1, 2, 3),
datetime.datetime(2024, 1, 2, 3), datetime.date(2024, 1, 2), 3**9000]"""


def test_plain_values_cross_the_line_both_ways_unchanged():
    imports = "import collections, datetime, decimal, fractions\n"
    tests = f"{imports}value = {VALUES}\nback = f(value)\nassert back == value\n"
    tests += "assert [type(b) for b in back] == [type(v) for v in value]\nassert str(back[6]) == '-0.0'\n"
    verdict = run_tests("def f(value): return value", tests)
    assert verdict.passed, verdict.reason


def test_objects_exceptions_iterators_and_changed_arguments():
    program = """
        class Pair:
            def __init__(self, a, b): self.a, self.b = a, b
        class Odd(ValueError): pass
        def total(pairs): return sum(p.a * p.b for p in pairs)
        def squares(n): return (i * i for i in range(n))
        def sort(items, seen): items.sort(); seen["n"] = len(items)
        def drain(items): items.clear(); return []
        def odd(): raise Odd("no")
    """
    tests = """
        import math
        pair = Pair(2, b=3)
        assert pair.a == 2 and total([pair, Pair(1, 1)]) == 7
        assert list(squares(4)) == [0, 1, 4, 9] and math.isclose(sum(squares(3)), 5)
        items, seen = [3, 1, 2], {}
        same = items
        assert sort(items, seen) is None and same == [1, 2, 3] and seen == {"n": 3}
        assert drain(items) != sorted(items)
        try:
            odd()
        except ValueError as error:
            assert str(error) == "no"
        else:
            raise AssertionError
    """
    verdict = run_tests(textwrap.dedent(program), textwrap.dedent(tests))
    assert verdict.passed, verdict.reason


def real_problems() -> list[dict]:
    folder = os.environ.get("POSTTRAIN_REAL_DATA")
    if not folder:
        pytest.skip("POSTTRAIN_REAL_DATA is unset: no HumanEval here")
    with gzip.open(Path(folder) / "data" / "humaneval" / "HumanEval.jsonl.gz") as file:
        return list(humaneval(map(json.loads, file)))


@pytest.mark.slow
def test_all_real_solutions_pass_and_functions_that_do_nothing_fail():
    problems = real_problems()

    def score(problem: dict, body: str | None) -> bool:
        start = problem["prompt"][0]["content"].partition("```python\n")[2].removesuffix("```")
        program = problem["solution"] if body is None else start + body
        return run_tests(program, problem["tests"], problem["entry_point"], Limits(20), helpers=start).passed

    with ThreadPoolExecutor() as pool:
        right = list(pool.map(lambda problem: score(problem, None), problems))
        idle = list(pool.map(lambda problem: score(problem, "    pass\n"), problems))
    assert (len(problems), sum(right), sum(idle)) == (164, 164, 0)


def test_a_script_shows_its_output_its_last_value_and_its_error():
    assert run_python("print('a')\n1 + 1").stdout == "a\n2\n"
    failed = run_python("def f():\n    return 1 / 0\nf()")
    assert failed.reason == "exit status 1" and "return 1 / 0" in failed.stderr and "sandbox" not in failed.stderr
    assert run_python("exit(3)").reason == "exit status 3"
    drawn = "import random; print(random.random(), hash('a'))"
    assert run_python(drawn) == run_python(drawn)


# ---- what a script can see and reach --------------------------------------------------------------------------------


def attempt(code: str) -> str:
    """What a script printed, whether it ended well or not."""
    found = run_python(textwrap.dedent(code), QUICK)
    return found.stdout + found.stderr


def test_nothing_of_the_machine_can_be_read(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    host._server.close()  # the next one is started with the token in the environment
    (tmp_path / "key").write_text(SECRET)
    (tmp_path / "link").symlink_to("/etc/passwd")
    paths = [str(tmp_path / "key"), "/etc/shadow", "/etc/passwd", os.path.expanduser("~"), "/proc/self/environ",
             "/proc/1/mem", "/proc/self/mem", "/sys", "/var", "/run", __file__, os.getcwd(), "/dev/shm",
             "/dev/mem"]  # fmt: skip
    said = attempt(f"""
        import os, sys, gc
        print(dict(os.environ), os.popen("env").read() if os.path.exists("/bin/sh") else "", sys.argv, os.getcwd())
        print([o for o in gc.get_objects() if isinstance(o, dict) and "HF_TOKEN" in o])
        libc = __import__("ctypes").CDLL(None); libc.getenv.restype = __import__("ctypes").c_char_p
        print(libc.getenv(b"HF_TOKEN"))
        os.symlink("/etc/passwd", "/tmp/link")
        for path in {paths!r} + ["/tmp/link", "../../../../etc/passwd"]:
            try: print("READ", path, open(path).read(40) if not os.path.isdir(path) else os.listdir(path))
            except OSError as e: print("refused", e.errno)
    """)
    assert SECRET not in said and "root:" not in said
    seen = [line for line in said.splitlines() if line.startswith("READ")]
    home = os.path.expanduser("~")
    assert all(f"READ {home} ['.pyenv']" in line or f"READ {home} []" in line for line in seen), seen
    assert said.count("refused") >= 14


def test_nothing_outside_can_be_written(tmp_path):
    target = tmp_path / "written"
    roots = ["/", "/usr/lib", "/lib", "/dev", os.path.dirname(os.__file__), str(tmp_path), "/tmp/.."]
    said = attempt(f"""
        import os
        for folder in {roots!r}:
            try: open(folder + "/written", "w").close(); print("WROTE", folder)
            except OSError: pass
        for path in ({str(target)!r}, os.__file__):
            try: open(path, "a").write("x"); print("WROTE", path)
            except OSError: pass
            try: os.chmod(path, 0o777); print("CHANGED", path)
            except OSError: pass
        open("/tmp/mine", "w").write("ok"); print(open("/tmp/mine").read())
    """)
    assert said == "ok\n" and not target.exists() and not Path("/tmp/mine").exists()
    assert "mine" not in attempt("import os; print(os.listdir('/tmp'))")  # nor does the next one see it


def test_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        said = attempt(f"""
            import socket
            for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, 40):
                try: socket.socket(family); print("SOCKET", family)
                except OSError as e: print(e.errno)
            try: socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), 1); print("CONNECTED")
            except OSError: pass
        """)
        assert said == "1\n" * 5
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_rights_and_no_way_to_get_them():
    said = attempt("""
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        def call(name, *a):
            r = getattr(libc, name)(*a); print(name, "WORKED" if r >= 0 else ctypes.get_errno())
        call("unshare", 0x10000000); call("mount", b"x", b"/tmp", b"tmpfs", 0, None); call("umount2", b"/usr/lib", 2)
        call("ptrace", 0, 0, 0, 0); call("chroot", b"/tmp"); call("setuid", 0); call("memfd_create", b"x", 0)
        call("shmget", 0, 4096, 0o600); call("setresuid", 0, 0, 0); call("sethostname", b"x", 1)
        call("syscall", 56, 0x10000011, 0, 0, 0, 0); call("setrlimit", 7, (ctypes.c_ulong * 2)(4096, 4096))
        call("prctl", 22, 0, 0, 0, 0); call("process_vm_readv", 1, None, 0, None, 0, 0)
        print(open("/dev/null").read() == "", len(os.urandom(3)))
    """)
    lines = said.splitlines()
    assert lines[-1] == "True 3" and len(lines) == 15 and "WORKED" not in said, said
    if os.uname().machine == "x86_64":
        assert said.count(" 1\n") == 11  # EPERM; EINVAL for ids that have no place in the namespace


def test_limits_of_files_processes_and_memory_hold():
    files = "f = open('/tmp/a', 'wb')\nn = 0\ntry:\n  while n < 99: n += f.write(bytes(2**20)) / 2**20; f.flush()\n"
    assert attempt(files + "except OSError: print(int(n) <= 16)").startswith("True")
    forks = "import os, time\nn = 0\ntry:\n  while True:\n    if os.fork() == 0: time.sleep(9)\n    n += 1\n"
    forks += "except OSError: print(n)\n"
    assert attempt(forks) == "3\n"
    assert (
        attempt("x = []\ntry:\n  while True: x.append(bytes(2**20))\nexcept MemoryError: print(len(x) < 512)")
        == "True\n"
    )


PROBE = """
import sys
sys.path.insert(0, sys.argv[1])
from posttrain.sandbox import run_tests, sandbox_obstacle
print(sandbox_obstacle())
print(run_tests("def double(x): return 2 * x", "assert double(2) == 4").passed)
"""


def test_where_the_kernel_refuses_nothing_runs_and_the_mend_is_named():
    if shutil.which("unshare") is None:
        pytest.skip("no unshare(1) here to make a namespace in")
    forbid = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    command = ["unshare", "-Ur", "sh", "-c", forbid, "sh", sys.executable, "-c", PROBE, str(Path(__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "True" not in done.stdout
    mend = "max_user_namespaces is 0: sudo sysctl -w user.max_user_namespaces"
    assert mend in done.stdout and mend in done.stderr.splitlines()[-1]


def test_a_user_without_rights_can_isolate_too():
    """Where the tests run as root: as user 1000, with a Python that user 1000 may read."""
    python = "/usr/bin/python3"
    if os.geteuid() or subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode:
        pytest.skip("not root, or no Python 3.11 at /usr/bin/python3")
    command = [python, "-B", "-c", PROBE, str(Path(__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, user=1000, group=1000, extra_groups=[], cwd="/")
    assert done.stdout == "None\nTrue\n", done.stdout + done.stderr


# ---- the trainer's side ---------------------------------------------------------------------------------------------


def test_from_many_threads_at_once():
    before = traces()
    results = {}
    programs = [f"def double(x): return x + {n % 3}" for n in range(12)]

    def run(n):
        results[n] = run_tests(programs[n], "assert double(2) == 4").passed

    threads = [threading.Thread(target=run, args=[n]) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: n % 3 == 2 for n in range(12)}
    assert traces() == before


def test_a_zygote_that_was_killed_is_started_again():
    run_python("1")
    dead = host.server().process
    threading.Timer(0.5, dead.kill).start()
    assert not run_tests("import time\ndef double(x): time.sleep(60)", TESTS, limits=QUICK).passed
    assert run_python("1").stdout == "1\n" and host.server().process.pid != dead.pid


DRIVER = """
import threading, time, sys
from posttrain.sandbox import Limits, run_python
from posttrain.sandbox.host import server
threading.Thread(target=run_python, args=["import time\\ntime.sleep(60)", Limits(60)], daemon=True).start()
time.sleep(1)
try:
    print(server().process.pid, flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print(run_python("'still here'").stdout, flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_everything_dies_with_the_trainer_and_not_before(number):
    """Ctrl-C goes to the whole foreground group: the trainer, which may go on, and not the sandboxes under it."""
    trainer = subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    server = int(trainer.stdout.readline())
    children = Path(f"/proc/{server}/task/{server}/children").read_text().split()
    assert len(children) == 1
    os.killpg(trainer.pid, number)
    assert trainer.stdout.read() == ("'still here'\n\n" if number == signal.SIGINT else "")
    trainer.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in (server, *children)):
        assert time.monotonic() < deadline, "the sandbox outlives the trainer"
        time.sleep(0.05)
