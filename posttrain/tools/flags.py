"""The flags of `posttrain chat`, `board` and `eval` that give a model tools. In: a verb. Out: its flags, and what they
say: the same names as the keys of RL and SFT.
"""

import argparse
from dataclasses import fields

from posttrain.errors import UserError

HELP = {
    "max_tool_calls": "calls that one reply may make; default: %(default)s",
    "max_tool_tokens": "tokens of an answer, the rest is cut; default: %(default)s",
    "tool_timeout": "seconds for an answer; default: %(default)s",
}


def add_flags(group) -> None:
    """`group`: a verb's parser or a group of its flags."""
    from posttrain.tool_calls import ToolLimits

    group.add_argument(
        "--tools", nargs="*", metavar="NAME", help="it may call: calculator, python, search, mcp:NAME or dotted paths"
    )
    group.add_argument(
        "--tool_options", metavar="JSON", help='their keywords by name: \'{"search": {"folder": "docs"}}\''
    )
    for limit in fields(ToolLimits):
        group.add_argument(f"--{limit.name}", type=limit.type, default=limit.default, help=HELP[limit.name])


def options_of(given: argparse.Namespace) -> dict:
    """What --tool_options says. UserError where it is no mapping."""
    import yaml

    try:
        found = yaml.safe_load(given.tool_options or "{}")
    except yaml.YAMLError as error:
        raise UserError(f"--tool_options: {given.tool_options!r} is no JSON or YAML: {error}") from error
    if not isinstance(found, dict):
        raise UserError(
            f"--tool_options: found {given.tool_options!r}, expected a mapping: '{{search: {{folder: docs}}}}'"
        )
    if found and not given.tools:
        raise UserError("--tool_options: given without --tools; name the tools, too")
    return found


def loaded(given: argparse.Namespace) -> tuple[list, object]:
    """(the tools, their `ToolLimits`). UserError for names, options or limits that will not do."""
    from posttrain.tool_calls import ToolLimits, limits_of
    from posttrain.tools import load_tools

    limits = ToolLimits(**limits_of(given))
    return load_tools(given.tools or [], options_of(given)), limits
