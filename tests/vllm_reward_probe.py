"""Let a real vLLM engine score token sequences with a saved reward model and write down what it says. One engine
lives in a process, so tests run this file: `python tests/vllm_reward_probe.py FOLDER SEQUENCES.json RESULT.json`.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}  # fmt: skip


def main(folder: str, sequences: str, result: str) -> None:
    from vllm import LLM, PoolingParams

    llm = LLM(
        folder, runner="pooling", convert="classify", dtype="float32", max_model_len=256, enforce_eager=True,
        disable_log_stats=True,
    )  # fmt: skip
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(Path(sequences).read_text())]
    raw = llm.classify(prompts, pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
    squashed = llm.classify(prompts, use_tqdm=False)
    found = {
        "scores": [output.outputs.probs for output in raw],
        "probabilities": [output.outputs.probs for output in squashed],
    }
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
