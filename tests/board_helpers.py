"""A board that runs in this process, and models that recite what a test wants to hear.

In: folders of models. Out: a `Board` with its address and its pool, a folder of a model. For the tests of
posttrain/board.
"""

import contextlib
import threading
import time

from posttrain.board import app, guard
from posttrain.board.stages import Pool, find


class Board:
    """`posttrain board` on a free port of 127.0.0.1; `url`, and the `pool` behind it."""

    def __init__(self, paths, build=app.build, **settings):
        self.pool = Pool(find(list(map(str, paths))), **settings)
        listener = app.listen("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        page = app.mounted(build(self.pool, str(paths[0]), []))
        self.server = app.server(guard.Guard(page, guard.hosts("127.0.0.1", self.port)), self.url)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=10)


@contextlib.contextmanager
def board(*paths, **settings):
    running = Board(paths, **settings)
    try:
        yield running
    finally:
        running.stop()


def reciter(folder, tokenizer, message, reply: str | None, positions: int = 512, tools=None) -> str:
    """Folder of a GPT-2 that says `reply` to `message`, and without one writes `la` until its context is full. With
    `tools` (schemas) `message` is a list of messages, and it says those after the first, whatever tools answer.

    Embeddings of positions are one-hot, tokens and layers are silent: the head maps each position to what stands next.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from posttrain.chat import encode_chat

    talk = message if tools else [{"role": "user", "content": message}]
    prompt = encode_chat(tokenizer, talk[:1], add_generation_prompt=True, tools=tools).input_ids
    said = tokenizer(" la" * positions if reply is None else reply, split_special_tokens=True).input_ids
    script = (said + ([] if reply is None else [tokenizer.eos_token_id]))[: positions - len(prompt)]
    if tools:
        script = encode_chat(tokenizer, talk, tools=tools).input_ids[len(prompt) :]
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=positions, n_embd=positions, n_layer=1, n_head=1, n_inner=8,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in (model.transformer.h[0].attn.c_proj.weight, model.transformer.h[0].mlp.c_proj.weight):
            parameter.zero_()
        model.transformer.wte.weight.zero_()
        model.transformer.wpe.weight.copy_(torch.eye(positions))
        model.lm_head.weight.zero_()
        for place, token in enumerate(script, start=len(prompt) - 1):
            model.lm_head.weight[token, place] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
