"""llama.cpp on a GGUF, in a process of its own: what it makes of texts, messages and token ids.

In:  a .gguf file. Out: `with LlamaCpp(path) as engine:` token ids of a text, the prompt of messages under the file's
     chat template, log-probabilities after a prompt. Everything runs on this machine's CPU, in fp32 but the weights.
Run: python -m posttrain.gguf_engine FILE CONTEXT    (prints its address; ends when its stdin closes)

llama.cpp comes in the package xllamacpp, as its HTTP server. A process of its own, since llama.cpp ends a process
whose file it cannot compute with.
"""

import http.client
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from posttrain.errors import UserError

MISSING = "{name} is not installed: pip install 'posttrain[export]'"
SECONDS = 600
FORCED = 1e4  # a logit bias that leaves no other token


class LlamaCpp:
    """A running llama.cpp with one file. UserError where the file cannot be loaded."""

    def __init__(self, path: Path, context: int, threads: int | None = None):
        for name in ("xllamacpp", "gguf"):
            if find_spec(name) is None:
                raise UserError(MISSING.format(name=name))
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; expected a GGUF, as posttrain export writes it")
        self.path, self.letter = Path(path), None
        threads = threads or max(1, len(os.sched_getaffinity(0)) // 2)
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by close)
        package = str(Path(__file__).resolve().parents[1])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(path), str(context), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment,
        )  # fmt: skip
        address = self.process.stdout.readline()
        if not address:
            raise self._dead("could not load it")
        host, _, port = address.strip().removeprefix("http://").rpartition(":")
        self.address = host, int(port)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the process; one that does not answer is killed."""
        if self.log.closed:
            return
        self.process.stdin.close()
        if self.process.poll() is None:
            try:
                self.process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process.stdout.close()
        self.log.close()

    def _dead(self, what: str) -> UserError:
        try:
            code = f"exit code {self.process.wait(timeout=5)}"
        except subprocess.TimeoutExpired:
            code = "it still runs, and is stopped"
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().splitlines() if line.strip()]
        told = [line for line in lines if "error" in line.lower() or "failed" in line.lower()] or lines
        self.close()
        return UserError(
            f"{self.path}: llama.cpp {what} ({code}): {' | '.join(told[-3:])[-600:] or 'it said nothing'}"
        )

    def ask(self, route: str, body: dict) -> dict:
        """POST JSON and read JSON. UserError where llama.cpp refuses or has died."""
        # A connection each: it closes one that was idle for some seconds, in the midst of the next request.
        connection = http.client.HTTPConnection(*self.address, timeout=SECONDS)
        try:
            connection.request("POST", route, json.dumps(body), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            read = json.loads(reply.read())
        except (http.client.HTTPException, OSError) as error:
            raise self._dead(f"gave no answer to {route}") from error
        finally:
            connection.close()
        if reply.status != 200:
            said = read.get("error", read)
            message = said.get("message", said) if isinstance(said, dict) else said
            raise UserError(f"{self.path}: llama.cpp refuses {route}: {message}")
        return read

    def tokenize(self, text: str, *, control: bool = True, begin: bool = False) -> list[int]:
        """Token ids. `control`: control tokens spelt out become control; `begin`: the begin token where the file asks
        for one."""
        return self.ask("/tokenize", {"content": text, "parse_special": control, "add_special": begin})["tokens"]

    def render(self, messages: list[dict]) -> str:
        """The prompt of `messages` under the file's chat template, for the next reply."""
        return self.ask("/apply-template", {"messages": messages})["prompt"]

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        """The tokens that a chat request with `messages` begins from."""
        return self.tokenize(self.render(messages), begin=True)

    def after(self, ids: list[int], most: int) -> dict[int, float]:
        """log p of the `most` likeliest tokens after `ids`, as {token: log p}.

        llama.cpp's server has no logits to ask for; it tells log-probabilities with what it generates, and none where
        that is half a character. So one plain letter is made the only choice: what it tells is the model's own.
        """
        if self.letter is None:
            self.letter = self.tokenize("a")[-1]
        body = {"prompt": ids, "n_predict": 1, "n_probs": most, "logit_bias": [[self.letter, FORCED]]}
        told = self.ask("/completion", {**body, "temperature": 0, "cache_prompt": True})
        places = told.get("completion_probabilities") or [{"top_logprobs": []}]
        found = {one["id"]: one["logprob"] for one in places[0]["top_logprobs"]}
        if not found:
            raise UserError(f"{self.path}: llama.cpp gives no log-probabilities after a prompt, expected {most}")
        return found

    def ends(self, ids: list[int], token: int) -> bool:
        """Whether `token` ends a text in this file's eyes: it is made the only choice after `ids`."""
        body = {"prompt": ids, "n_predict": 2, "logit_bias": [[token, FORCED]], "temperature": 0}
        return self.ask("/completion", body).get("stop_type") == "eos"


def main() -> None:
    """Serve one file until stdin closes."""
    path, context, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    tell = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp's own lines go to stderr, the address alone to stdout
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.fit_params = context, 1, False
    params.cpuparams.n_threads = threads
    params.n_gpu_layers, params.warmup, params.ui = 0, False, False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
    server = xllamacpp.Server(params)
    print(server.listening_address, file=tell, flush=True)
    sys.stdin.read()
    tell.close()
    os._exit(0)  # its threads need no farewell


if __name__ == "__main__":
    main()
