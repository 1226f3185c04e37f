"""posttrain and the recipes as users of a Hub run them, in processes of their own that start warm.

In: a Hub (tests/hub_server.py). Out: finished processes. The client reads HF_ENDPOINT when it is imported, so that the
warm process (tests/warm_recipes.py) is one of its own, made for this Hub.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from hub_server import ANN
from recipe_runs import ENV, ROOT


class Client:
    """Ends with the test's process: its stdin closes. `home`: HF_HOME and what the processes print."""

    def __init__(self, hub, home: Path):
        self.home, self.count = home, 0
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "warm_recipes.py")], cwd=ROOT, start_new_session=True, text=True,
            env={**os.environ, **ENV, **hub.env(home)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, **request) -> int:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, argv: list, token: str = ANN, **env) -> "Started":
        """A script with its arguments, running."""
        self.count += 1
        out, err = self.home / f"{self.count}.out", self.home / f"{self.count}.err"
        argv, env = list(map(str, argv)), {"HF_TOKEN": token, **env}
        return Started(self, argv, out, err, self.ask(argv=argv, env=env, out=str(out), err=str(err)))

    def run(self, argv: list, token: str = ANN, **env) -> subprocess.CompletedProcess:
        return self.start(argv, token, **env).finish()

    def posttrain(self, *arguments, token: str = ANN) -> subprocess.CompletedProcess:
        return self.run([ROOT / "posttrain" / "cli.py", *arguments], token)

    def said(self) -> str:
        """All that any of them printed."""
        return "\n".join(path.read_text() for path in sorted(self.home.glob("*.[oe]*")) if path.is_file())


class Started:
    def __init__(self, client: Client, argv: list[str], out: Path, err: Path, pid: int):
        self.client, self.argv, self.out, self.err, self.pid = client, argv, out, err, pid

    def finish(self) -> subprocess.CompletedProcess:
        code = self.client.ask(wait=self.pid)
        return subprocess.CompletedProcess(self.argv, code, self.out.read_text(), self.err.read_text())
