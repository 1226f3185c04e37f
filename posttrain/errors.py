"""Errors that users can mend, and the one place where they become a short message and an exit code.

In: a recipe's `main`. Out: the process ends. A recipe's last lines are

    if __name__ == "__main__":
        entry(main)

Exit codes: 0 done, 2 a UserError or a full disk, a path that may not be written, a busy port; 130 Ctrl-C; 1 a bug of
ours, with its traceback. `--debug` or POSTTRAIN_DEBUG=1 shows the traceback of every error.
"""

import errno
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

# What the operating system refuses and the user can mend. The text the error itself gives stands in front of these.
MENDS = {
    errno.ENOSPC: "the disk is full: free some space or write to another folder, then run it again",
    errno.EDQUOT: "the disk quota is used up: free some space or write to another folder, then run it again",
    errno.EROFS: "the file system is read-only: write to another folder",
    errno.EACCES: "this user has no permission: change the path's owner or mode, or use another folder",
    errno.EADDRINUSE: "the network port is busy: stop the process that holds it or use another port "
    "(`accelerate launch --main_process_port 0` picks a free one)",
}


class UserError(Exception):
    """Something the user can mend. `str(error)` is all they see: the thing (file, row, key or flag), what was found,
    what was expected, how to mend it."""


def entry(main: Callable[[], Any]) -> NoReturn:
    """Run `main` and exit: with 0, or with the integer that `main` returns, or with the code of its error.

    Raises SystemExit, or whatever `main` raised that is no user's error (Python then prints it and exits with 1).
    """
    try:
        code = main()
    except KeyboardInterrupt as error:
        _stop(error, "interrupted", 130)
    except UserError as error:
        _stop(error, f"error: {error}", 2)
    except BrokenPipeError:  # `posttrain inspect ... | head`: who reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at exit
        sys.exit(128 + 13)
    except Exception as error:
        mend = mend_of(error)
        if mend is None:
            raise
        _stop(error, f"error: {error}: {mend}", 2)
    _leave_group(code)
    sys.exit(code)


def _leave_group(code: int | None) -> None:
    """Of several processes, end this one at once: all is written by now, and threads of a process group that still run
    while Python shuts down abort it now and then ("terminate called without an active exception", torch 2.13)."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def mend_of(error: BaseException) -> str | None:
    """How to mend an operating system's refusal, found in `error` or in what it was raised from; None: it is none.

    safetensors ("... (os error 28)") and torch ("... name: EADDRINUSE ...") raise their own classes, with the system's
    name or text of the error in the message and no errno.
    """
    for number, mend in MENDS.items():
        signs = (f"(os error {number})", errno.errorcode[number], os.strerror(number).lower())
        if getattr(error, "errno", None) == number or any(sign in _both_cases(error) for sign in signs):
            return mend
    return mend_of(error.__cause__) if error.__cause__ else None


def _both_cases(error: BaseException) -> str:
    return f"{error}\n{str(error).lower()}"


def _stop(error: BaseException, message: str, code: int) -> NoReturn:
    if "--debug" in sys.argv or os.environ.get("POSTTRAIN_DEBUG") == "1":
        traceback.print_exception(error)
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)
