"""Exit codes and messages, each from a real process that ends the way a user's would."""

import errno
import os
import subprocess
import sys
import textwrap

import pytest

from posttrain.errors import UserError, mend_of


def run(body, *flags, **env):
    """Run a script whose `main` is `body`; returns (exit code, stderr)."""
    script = "import os, signal, socket, sys\nfrom posttrain.errors import UserError, entry\n\ndef main():\n"
    script += textwrap.indent(textwrap.dedent(body), "    ") + "\n\nentry(main)\n"
    env = {key: value for key, value in os.environ.items() if key != "POSTTRAIN_DEBUG"} | env
    done = subprocess.run([sys.executable, "-c", script, *flags], capture_output=True, text=True, env=env)
    return done.returncode, done.stderr


@pytest.mark.parametrize(("body", "code"), [("pass", 0), ("return 3", 3), ("sys.exit(4)", 4)])
def test_exit_codes_without_an_error(body, code):
    assert run(body) == (code, "")


def test_user_error_is_one_line():
    assert run("raise UserError('sft.yaml:7: unknown key')") == (2, "error: sft.yaml:7: unknown key\n")


@pytest.mark.parametrize(("flags", "env"), [(["--debug"], {}), ([], {"POSTTRAIN_DEBUG": "1"})])
def test_debug_shows_where_and_why(flags, env):
    body = """
        try:
            {}["key"]
        except KeyError as error:
            raise UserError("no key") from error
    """
    code, text = run(body, *flags, **env)
    assert code == 2 and text.endswith("error: no key\n")
    assert "Traceback" in text and "KeyError: 'key'" in text


def test_ctrl_c():
    assert run("os.kill(os.getpid(), signal.SIGINT); signal.pause()") == (130, "interrupted\n")


def test_a_bug_keeps_its_traceback():
    code, text = run("1 / 0")
    assert code == 1 and "Traceback" in text and text.endswith("ZeroDivisionError: division by zero\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_full_disk():
    code, text = run("with open('/dev/full', 'w') as file: file.write('x')")
    assert code == 2 and "the disk is full: free some space" in text and "Traceback" not in text


def test_busy_port():
    body = """
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            first.listen()
            second.bind(first.getsockname())
    """
    code, text = run(body)
    assert code == 2 and "the network port is busy" in text and "--main_process_port 0" in text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path):
    tmp_path.chmod(0o500)
    code, text = run(f"open({str(tmp_path / 'file')!r}, 'w')")
    assert code == 2 and str(tmp_path / "file") in text and "no permission" in text


@pytest.mark.parametrize(
    ("number", "mend"), [(errno.EROFS, "write to another folder"), (errno.EACCES, "no permission")]
)
def test_the_path_is_named(number, mend):
    # Raised by hand: a read-only mount needs rights that a test has not, and root is never refused.
    code, text = run(f"raise OSError({number}, os.strerror({number}), 'runs/x/stage.json')")
    assert code == 2 and "'runs/x/stage.json'" in text and mend in text and "Traceback" not in text


def test_a_missing_file_nobody_checked_for_is_a_bug():
    code, text = run("open('no/such/file')")
    assert code == 1 and "Traceback" in text


@pytest.mark.parametrize(
    ("message", "words"),
    [
        # Copied from safetensors 0.8 and torch 2.13 on a full and on a read-only disk, and with a taken port.
        ("Error while serializing: I/O error: No space left on device (os error 28)", "disk is full"),
        ('I/O error: Read-only file system (os error 30) at path "/ro/.tmpmUlRns"', "read-only"),
        (
            "[enforce fail at inline_container.cc:747] . open file failed with strerror: Read-only file system",
            "read-only",
        ),
        (
            "failed to listen. port: 29777, code: -98, name: EADDRINUSE, message: address already in use",
            "port is busy",
        ),
    ],
)
def test_libraries_that_raise_their_own_classes(message, words):
    assert words in mend_of(RuntimeError(message))


def test_the_cause_counts():
    try:
        try:
            raise OSError(errno.ENOSPC, "full")
        except OSError as error:
            raise RuntimeError("could not write the data set") from error
    except RuntimeError as error:
        assert "disk is full" in mend_of(error)
    assert mend_of(RuntimeError("out of tokens")) is None
    assert issubclass(UserError, Exception)


def test_a_reader_that_leaves_early_is_no_error():
    body = "from posttrain.errors import entry; entry(lambda: [print('x' * 1000) for _ in range(10_000)] and 0)"
    pipe = f'{sys.executable} -c "{body}" | head -1; echo code ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", pipe], capture_output=True, text=True)
    assert done.stdout.endswith("code 141\n") and done.stderr == "", done.stderr
