"""The Python tool that a model may call. In: code. Out: what it prints, from a sandbox (posttrain/sandbox).

The standard library, no network, no files but its own /tmp, ten seconds; each call begins afresh. Where the machine
cannot isolate it, the call raises UserError and the run stops.
"""

from posttrain.sandbox import Limits, run_python

LIMITS = Limits(seconds=10.0)
MAX_CHARS = 4000


def python(code: str) -> str:
    """
    Runs Python code in a fresh interpreter and returns what it prints and the value of its last line.

    Args:
        code: A Python program. Only the standard library is there; nothing is kept from one call to the next.
    """
    found = run_python(code, LIMITS)
    said = found.stdout.strip("\n")
    if found.reason:
        errors = found.stderr.strip("\n")
        parts = [said, errors if errors and found.reason.startswith("exit status") else f"error: {found.reason}"]
        said = "\n".join(part for part in parts if part)
    if len(said) > MAX_CHARS:  # an error stands at the end, a result anywhere
        half = MAX_CHARS // 2
        said = f"{said[:half]}\n... ({len(said) - 2 * half} characters left out) ...\n{said[-half:]}"
    return said or "(no output)"
