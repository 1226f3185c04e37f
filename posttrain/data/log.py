"""What loading has to tell the user: a line on stderr, from the first process only.

In: a text. Out: `data: ...`, by the logger `posttrain.data`, which programs that use us as a library may redirect.
"""

import logging
import os

log = logging.getLogger("posttrain.data")


def say(text: str) -> None:
    """Every process of a launch loads the same rows: one of them speaks."""
    if os.environ.get("RANK", "0") == "0":
        log.warning("data: %s", text)
