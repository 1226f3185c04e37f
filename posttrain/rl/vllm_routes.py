"""What `posttrain serve` adds to vLLM's own server: routes for a trainer, and a guard before all routes.

In: HTTP requests with token ids, or with the folder or the process group that new weights come through. Out: JSON with
token ids and log-probabilities. vLLM loads `TrainerRoutes` inside the server (`--middleware`).

    GET  /posttrain/info       what is served
    POST /posttrain/generate   {"weights": V, "prompts": [[ids]], "seeds": [[one a sample]], "sampling": {...}}
    POST /posttrain/load       {"weights": V, "folder": path}; from this machine only
    POST /posttrain/group      {"group": G, "port": P, "size": N, "backend": B, "timeout": seconds}
    POST /posttrain/receive    {"weights": V, "group": G, "timeout": seconds}

Every set of weights has a name, V; a request that names another one than the server has is refused, so that nobody
samples from the weights of another trainer or of a server that was started anew. So has every group, G: the workers
connect to port P of the machine that asks, and of no other one, and are ranks 1 to N - 1 (see rl/weight_group.py).
"""

import asyncio
import hmac
import ipaddress
import json
import os
import uuid
from pathlib import Path

from posttrain.rl.vllm_worker import WEIGHT_FOLDER

MAX_BODY = 256 * 2**20  # bytes
OPEN_TO_ALL = ("/health", "/ping", "/version")
ALLOWED = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/metrics")
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")


class Refused(Exception):
    """A request that is not served: an HTTP status and why."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


class TrainerRoutes:
    """ASGI middleware around vLLM's application."""

    def __init__(self, app):
        self.app, self.weights, self.group, self.devices = app, None, None, []
        self.loading = asyncio.Lock()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":  # once, when the engine is up and before requests are taken
            self.devices = await scope["app"].state.engine_client.collective_rpc("posttrain_prepare")
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        try:
            check(scope)
            if not scope["path"].startswith("/posttrain/"):
                return await self.app(scope, receive, send)
            answer = await self._answer(scope, receive)
        except Refused as refusal:
            return await reply(send, refusal.status, {"error": str(refusal)})
        except ValueError as error:  # a prompt too long, a key missing, no JSON
            return await reply(send, 400, {"error": f"{type(error).__name__}: {error}"})
        except asyncio.CancelledError:
            raise
        except Exception as error:  # the engine is dead: vLLM ends the server itself
            return await reply(send, 500, {"error": f"{type(error).__name__}: {error}"})
        await reply(send, 200, answer)

    async def _answer(self, scope, receive) -> dict:
        engine = scope["app"].state.engine_client
        call = (scope["method"], scope["path"])
        if call == ("GET", "/posttrain/info"):
            return {**describe(engine), "devices": self.devices, "weights": self.weights}
        if call == ("POST", "/posttrain/generate"):
            body = await read_json(receive)
            return await until_disconnect(receive, self._generate(engine, body))
        if call == ("POST", "/posttrain/load"):
            return await self._load(engine, await read_json(receive))
        if call == ("POST", "/posttrain/group"):
            return await self._join(engine, str(address(scope)), await read_json(receive))
        if call == ("POST", "/posttrain/receive"):
            return await self._receive(engine, await read_json(receive))
        raise Refused(404, f"no route {' '.join(call)}")

    async def _generate(self, engine, body: dict) -> dict:
        if self.weights is None or body["weights"] != self.weights:
            raise Refused(
                409,
                f"asked for weights {body['weights']}, the server has {self.weights}: a sync failed, it was started "
                "anew, or another trainer uses it, too; every trainer needs a server of its own",
            )
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        async def sample(prompt: list[int], seed: int) -> list:
            params = SamplingParams(**body["sampling"], seed=seed, output_kind=RequestOutputKind.FINAL_ONLY)
            async for output in engine.generate({"prompt_token_ids": prompt}, params, uuid.uuid4().hex):
                last = output.outputs[0]
            return [list(last.token_ids), list(last.logprobs.logprobs), last.finish_reason]

        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(sample(prompt, seed))
                for prompt, seeds in zip(body["prompts"], body["seeds"], strict=True)
                for seed in seeds
            ]
        return {"completions": [task.result() for task in tasks]}

    async def _load(self, engine, body: dict) -> dict:
        folder = Path(body["folder"])
        if not folder.name.startswith(WEIGHT_FOLDER) or not list(folder.glob("*.safetensors")):
            raise Refused(400, f"folder: found {folder}, expected {WEIGHT_FOLDER}* with safetensors files in it")
        async with self.loading:
            return await self._replace(engine, body["weights"], "posttrain_load", str(folder))

    async def _join(self, engine, host: str, body: dict) -> dict:
        places = (host, int(body["port"]), int(body["size"]), body["backend"], float(body["timeout"]))
        if body["backend"] not in ("gloo", "nccl") or places[2] != len(self.devices) + 1:
            raise Refused(400, f"group: found {places}, expected gloo or nccl, and {len(self.devices) + 1} ranks")
        async with self.loading:
            self.group = None
            await engine.collective_rpc("posttrain_join", args=places)
            self.group = body["group"]
        return {"group": self.group}

    async def _receive(self, engine, body: dict) -> dict:
        async with self.loading:
            if not self.group or body["group"] != self.group:
                raise Refused(
                    409, "another trainer formed a group with this server; every trainer needs a server of its own"
                )
            try:
                return await self._replace(engine, body["weights"], "posttrain_receive", float(body["timeout"]))
            except Exception:
                self.group = None  # its workers left it
                raise

    async def _replace(self, engine, name: str, method: str, argument) -> dict:
        self.weights = None  # what is half loaded answers to no name
        await engine.pause_generation(mode="wait", clear_cache=True)
        try:
            await engine.collective_rpc(method, args=(argument,))
            await engine.reset_prefix_cache()
        finally:
            await engine.resume_generation()
        self.weights = name
        return {"weights": name}


def describe(engine) -> dict:
    """What a trainer compares with its own model."""
    import vllm

    model = engine.model_config
    return {
        "vllm": vllm.__version__,
        "model": model.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_model_len": model.max_model_len,
        "vocab_size": model.hf_text_config.vocab_size,
        "hidden_size": model.hf_text_config.hidden_size,
        "num_hidden_layers": model.hf_text_config.num_hidden_layers,
    }


def check(scope) -> None:
    """Raises Refused for requests of web pages, of other machines without the key, and to routes that are not offered.

    A page in a browser on this machine can reach 127.0.0.1, too: it sends an Origin, or a Host that is its own name.
    """
    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
    path, key, local = scope["path"], os.environ.get("VLLM_API_KEY"), is_local(scope)
    if "origin" in headers:
        raise Refused(403, "requests of web pages are not served")
    if local and headers.get("host", "").rpartition(":")[0] not in LOCAL_NAMES:
        raise Refused(403, f"Host: found {headers.get('host')!r}, expected one of {', '.join(LOCAL_NAMES)}")
    if path in OPEN_TO_ALL:
        return
    if key and not hmac.compare_digest(headers.get("authorization", "").encode(), f"Bearer {key}".encode()):
        raise Refused(401, "the server wants the key of its VLLM_API_KEY: set the same one for the client")
    if not local and (not key or path == "/posttrain/load"):
        raise Refused(403, f"{path} is served to this machine only")
    if not path.startswith("/posttrain/") and path not in ALLOWED:
        raise Refused(404, f"{path} is not served")


def is_local(scope) -> bool:
    """Whether the other end of the connection is on this machine."""
    found = address(scope)
    return found is not None and found.is_loopback


def address(scope) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Who asks; None where the connection does not say."""
    if not scope.get("client"):
        return None
    try:
        found = ipaddress.ip_address(scope["client"][0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


async def read_json(receive) -> dict:
    """The body of a request. Raises Refused where it is too long, ValueError where it is no mapping."""
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "the request broke off")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY:
            raise Refused(413, f"a request of more than {MAX_BODY} bytes")
        more = message.get("more_body", False)
    body = json.loads(b"".join(parts))
    if not isinstance(body, dict):
        raise ValueError(f"found {type(body).__name__}, expected a mapping")
    return _Body(body)


class _Body(dict):
    def __missing__(self, key):
        raise ValueError(f"{key} is missing")


async def until_disconnect(receive, work) -> dict:
    """`work`'s result; where the client goes away first, `work` is cancelled, and vLLM aborts its requests."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(receive())
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refused(499, "the client went away")
        try:
            return task.result()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
    finally:
        task.cancel()
        gone.cancel()


async def reply(send, status: int, content: dict) -> None:
    """One JSON answer."""
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
