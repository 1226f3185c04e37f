"""What runs inside vLLM's worker, in the trainer's process or in a server's: small mends, and loading weights.

In: vLLM's model or worker. Out: they are changed in place. Measured with vLLM 0.31.
"""

import os
import select
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

WEIGHT_FOLDER = "posttrain-weights-"  # what the folders are called through which weights travel
SERVER_PID = "POSTTRAIN_SERVER_PID"  # environment variable with the process id of `posttrain serve`


class WeightLoader:
    """Methods for the worker of a server (`worker_extension_cls`), called by name."""

    def posttrain_prepare(self) -> str:
        """What the worker runs on, see `describe_device`."""
        from posttrain.rl.weight_group import describe_device

        use_seeds_alone(self)
        end_with(int(os.environ[SERVER_PID]))
        self.posttrain_group = None
        return describe_device(self.device)

    def posttrain_load(self, folder: str) -> None:
        """Take the weights of every safetensors file in `folder`, under their Hugging Face names."""
        self.reload_weights(weights_iterator=stored_weights(Path(folder)))
        repack_tied_head(self.get_model())

    def posttrain_join(self, host: str, port: int, size: int, backend: str, timeout: float) -> None:
        """Become a rank of a trainer's new weight group; an older one is left."""
        import torch

        from posttrain.rl.weight_group import join

        self.posttrain_leave()
        device = self.device if backend == "nccl" else torch.device("cpu")
        self.posttrain_group = join(host, port, 1 + self.rank, size, backend, device, timeout)

    def posttrain_leave(self) -> None:
        if self.posttrain_group is not None:
            self.posttrain_group.close()
        self.posttrain_group = None

    def posttrain_receive(self, timeout: float) -> None:
        """Take the weights that the trainer sends through the group. After a failure the group is left."""
        failure: list[Exception] = []
        try:
            self.reload_weights(weights_iterator=as_far_as(self.posttrain_group.receive(timeout), failure))
            if failure:
                raise failure[0]
        except BaseException:
            self.posttrain_leave()
            raise
        repack_tied_head(self.get_model())


def as_far_as(weights: Iterator[tuple], failure: list[Exception]) -> Iterator[tuple]:
    """`weights` up to what they raise, which is put into `failure`.

    `reload_weights` must come to its end: what it got of a layer that is not complete would be counted as part of the
    next weights, and that layer be made of both.
    """
    try:
        yield from weights
    except Exception as error:
        failure.append(error)


def stored_weights(folder: Path) -> Iterator[tuple]:
    """(name, tensor) of every safetensors file; memory-mapped, so that nothing is held twice."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                yield name, file.get_tensor(name)


def end_with(server: int) -> None:
    """Let this process and vLLM's engine core end when process `server` does: killed with -9, it cannot tell them, and
    they would keep their memory and the GPU for ever (vLLM 0.31)."""

    def watch() -> None:
        descriptor = os.pidfd_open(server)
        select.select([descriptor], [], [])
        if os.getppid() not in (1, server):
            os.kill(os.getppid(), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="end with the server", daemon=True).start()


def repack_tied_head(model) -> None:
    """On CPU a tied lm_head keeps its own oneDNN-packed copy, which `reload_weights` leaves stale.

    Without this the engine goes on sampling from the old head.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and getattr(model.config, "tie_word_embeddings", False):
        for module in model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)


def use_seeds_alone(worker) -> None:
    """On CPU the sampler draws noise for all rows from torch's global generator, then again from the rows' own seeds.

    The first draw is thrown away where every row has a seed, costs as much as the second, and would move the random
    state of a trainer in the same process. The sampler's other path draws the very same samples without it.
    """
    from vllm.platforms import current_platform
    from vllm.v1.sample import sampler as module

    if not current_platform.is_cpu():
        return
    # Ranks of the sampled tokens, which nobody reads here, are counted by a function that compiles for 2-3 s at its
    # first call, though enforce_eager is set.
    module.batched_count_greater_than = lambda logprobs, values: (logprobs >= values).sum(-1)
    sampler = worker.model_runner.sampler.topk_topp_sampler

    def forward(logits, generators, k, p):
        seeded = len(generators) == len(logits)
        return (sampler.forward_native if seeded else sampler.forward_cpu)(logits, generators, k, p)

    sampler.forward = forward
