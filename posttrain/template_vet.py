"""Try a chat template in a process of its own before ours renders it: attribute tricks, endless loops, huge output.

In: the template's text. Out: nothing, or UserError. A template from the Hub is a program. Jinja's sandbox keeps it
from Python's objects, but not from running for ever or filling the memory, so a child process with a limit on CPU
time and memory renders a battery of short conversations first. What that guarantees, and what it does not:

- A template that loops, fills memory or reaches for Python's attributes on every conversation, or on one of the
  battery, never runs in our process. It ends in an error within about a second.
- One that waits for a certain text and loops then is stopped by the limit on each render (template_render.py), in the
  main thread.
- One that waits for a certain text and then fills the memory is not stopped. Powers and large numbers, which do it in
  one step, are refused wherever they stand, but doubling a text forty times looks like any other work.

Run as a script by `vet`: it imports jinja2 and no more, so that it starts in a tenth of a second.
"""

import json
import resource
import signal
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

CPU_SECONDS = 0.5  # a render of the battery takes about a hundredth of it
MEMORY = 1 << 29  # bytes of address space beside those that Python and jinja2 take
WALL_SECONDS = 60  # for a machine so busy that half a second of CPU time does not come
MOST_CHARACTERS = 1_000_000  # of one render of the battery
MOST_NUMBER = 10_000_000  # center(10**9), 'x' * 10**9


def vet(template: str) -> None:
    """Return if the template may be rendered here; UserError says what it did."""
    from posttrain.errors import UserError

    fault = tried(template)
    if fault is not None:
        raise UserError(
            f"the chat template is not safe to render: {fault}. Use another, such as chat_templates/chatml.jinja"
        )


@lru_cache(maxsize=256)
def tried(template: str) -> str | None:
    """What is wrong with the template, None if nothing; a process finds out once a text."""
    # -P: this folder has modules named like those of the standard library
    command = [sys.executable, "-P", __file__]
    try:
        done = subprocess.run(command, input=json.dumps(template).encode(), capture_output=True, timeout=WALL_SECONDS)
    except subprocess.TimeoutExpired:
        return f"it did not end within {WALL_SECONDS} s"
    return verdict(done)


def verdict(done: subprocess.CompletedProcess) -> str | None:
    """What the child found, None if nothing."""
    if done.returncode == -signal.SIGPROF:
        return f"it did not end within {CPU_SECONDS} s of CPU time on a conversation of a few words (an endless loop?)"
    if done.returncode == 0:
        return json.loads(done.stdout)
    last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
    return f"it ended the process that tried it (exit code {done.returncode}{': ' if last else ''}{''.join(last)})"


# ---- the child ------------------------------------------------------------------------------------------------------


def battery() -> list[dict]:
    """Variables of the renders that are tried: all roles, empty and long texts, tools, many turns."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, "x"]}}}
    schema = {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "add", "description": "sum", "parameters": schema}}
    turn = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]
    system = {"role": "system", "content": "Be brief."}
    thought = {"role": "assistant", "content": "five", "reasoning_content": "2+3"}
    used = [
        turn[0],
        {"role": "assistant", "content": None, "tool_calls": [{**call, "id": "abcdefghi"}]},
        {"role": "tool", "name": "add", "tool_call_id": "abcdefghi", "content": "3"},
    ]
    blocks = [{"role": message["role"], "content": [{"type": "text", "text": "x"}]} for message in turn]
    long = [{"role": "user", "content": "word " * 2000}, {"role": "assistant", "content": "<think>\nx\n</think>\n\ny"}]
    talks = [
        turn[:1],
        turn,
        [system, *turn],
        turn * 20,
        [*turn, turn[0], thought],
        blocks,
        long,
        [{**turn[0], "content": ""}],
    ]
    plain = [{"messages": talk, "tools": None} for talk in [*talks, [*used, turn[1]]]]
    with_tools = [{"messages": talk, "tools": [tool]} for talk in (turn, [system, *used, turn[1], *turn])]
    return [{**each, "add_generation_prompt": prompt} for each in (*plain, *with_tools) for prompt in (False, True)]


def environment():
    """Jinja as transformers sets it up for templates, but an unsafe attribute is an error and not an empty text."""
    import jinja2.ext
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Strict(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj, attribute):
            raise SecurityError(f"attribute {attribute!r} of {type(obj).__name__}")

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("inside"), [], [], body).set_lineno(line)

        def inside(self, caller):
            return caller()

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    found = Strict(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    found.filters["tojson"] = tojson
    found.globals |= {"raise_exception": raise_exception, "strftime_now": lambda form: "1 January 2026"}
    return found


def written(environment, template: str) -> str | None:
    """What in the text itself is refused, whatever the conversation."""
    from jinja2 import nodes

    tree = environment.parse(template)
    for node in tree.find_all((nodes.Getattr, nodes.Getitem, nodes.Pow, nodes.Const)):
        name = node.attr if isinstance(node, nodes.Getattr) else getattr(getattr(node, "arg", None), "value", None)
        if isinstance(name, str) and name.startswith("__"):
            return f"line {node.lineno} reads the attribute {name!r}, which is Python's own"
        if isinstance(node, nodes.Pow):
            return f"line {node.lineno} raises to a power (**), which can take hours and no format needs"
        if isinstance(node, nodes.Const) and isinstance(node.value, int) and abs(node.value) > MOST_NUMBER:
            return f"line {node.lineno} has the number {node.value}, and no format needs one over {MOST_NUMBER}"
    return None


def trial(template: str) -> str | None:
    """Render the battery; what is wrong, or None. A conversation that the template refuses is no fault."""
    from jinja2.exceptions import SecurityError, TemplateSyntaxError

    try:
        jinja = environment()
        fault = written(jinja, template)
        if fault is not None:
            return fault
        compiled = jinja.from_string(template)
    except TemplateSyntaxError as error:
        return f"line {error.lineno} is no Jinja: {error.message}"
    except (MemoryError, RecursionError) as error:
        return f"it cannot even be compiled: {type(error).__name__}"
    special = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    for variables in battery():
        try:
            length = len(compiled.render(**variables, **special))
        except SecurityError as error:
            return f"the sandbox stopped it: {error}"
        except (MemoryError, OverflowError, RecursionError) as error:
            return f"a conversation of a few words takes too much memory or steps: {error or type(error).__name__}"
        except Exception:  # a refusal of the template, or a key that this conversation lacks
            continue
        if length > MOST_CHARACTERS:
            return f"it writes {length} characters for a conversation of a few words"
    return None


def child() -> None:
    import jinja2.sandbox  # noqa: F401  its import is not the template's time

    template = json.loads(sys.stdin.buffer.read())
    statm = Path("/proc/self/statm")  # where there is none, macOS, the limit has no effect anyway
    taken = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    # The default action of SIGPROF ends the process, inside one long operation of C code, too.
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    print(json.dumps(trial(template)))


if __name__ == "__main__":
    child()
