"""The board's models: which are found and how they are named, what a reply is made of, what stays in memory.

Run: pytest tests/test_board_stages.py
"""

import shutil
import threading

import pytest
import torch
from board_helpers import reciter

from posttrain.board.stages import Drawn, Pool, Settings, find, in_run
from posttrain.chat import encode_chat
from posttrain.errors import UserError

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("models")
    return [reciter(root / name, tokenizer, "Hello", f"I am {name}.") for name in ("one", "two", "three")]


def last(pieces):
    return list(pieces)[-1]


def test_a_run_gives_its_models_in_the_order_of_their_making(small_chain):
    entries = find([str(small_chain)])
    assert [entry.name for entry in entries] == ["pretrain", "sft", "ppo", "grpo"]
    assert [entry.is_base for entry in entries] == [True, False, False, False]
    assert entries[3].manifest["stage"] == "grpo"
    apart = {path.rpartition("/")[2]: why for path, why in in_run(str(small_chain)) if why}
    assert set(apart) == {"tokenizer", "reward"} and "scores replies" in apart["reward"]


def test_names_are_unique_and_a_model_is_there_once(small_chain, tmp_path, folders):
    shutil.copytree(small_chain / "sft", tmp_path / "other" / "sft")
    names = [entry.name for entry in find([str(small_chain), str(tmp_path / "other"), f"{small_chain}/grpo/"])]
    assert names == ["pretrain", "small/sft", "ppo", "grpo", "other/sft"]
    assert [entry.name for entry in find(folders)] == ["one", "two", "three"]


def test_what_is_no_model_is_said(small_chain, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        find([str(small_chain / "nothing")])
    with pytest.raises(UserError, match="reward model"):
        find([str(small_chain / "reward")])
    shutil.copytree(small_chain / "tokenizer", tmp_path / "run" / "tokenizer")
    (tmp_path / "run" / "sft").mkdir()
    (tmp_path / "run" / "sft" / "run.json").write_text("{}")
    with pytest.raises(UserError, match="sft has not finished; tokenizer has no model"):
        find([str(tmp_path / "run")])


def test_greedy_pieces_are_generates_tokens_with_their_probabilities(small_chain):
    """The oracle is transformers' own `generate` on the same ids."""
    pool = Pool(find([str(small_chain)]))
    done = last(pool.stream("sft", HELLO, Settings(temperature=0, max_new_tokens=12, system="Be brief.")))
    with pool.use("sft") as loaded:
        model, tokenizer = loaded.model, loaded.tokenizer
    ids = encode_chat(tokenizer, [{"role": "system", "content": "Be brief."}, *HELLO], add_generation_prompt=True)
    assert done.prompt_ids == ids.input_ids
    out = model.generate(
        torch.tensor([done.prompt_ids]), do_sample=False, max_new_tokens=12, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    new = out.sequences[0, len(done.prompt_ids) :].tolist()
    assert [token.id for token in done.tokens] == new
    probabilities = [step[0].softmax(-1)[token].item() for step, token in zip(out.logits, new, strict=True)]
    assert [token.probability for token in done.tokens] == pytest.approx(probabilities, abs=1e-5)
    assert done.text == tokenizer.decode(new, skip_special_tokens=True)


def test_a_base_model_completes_and_a_chat_model_is_cut(small_chain):
    pool = Pool(find([str(small_chain)]))
    settings = Settings(max_new_tokens=3, seed=1, system="Be kind.")
    base = last(pool.stream("pretrain", "Once upon", settings))
    tokenizer = pool.tokenizer("pretrain")
    assert tokenizer.decode(base.prompt_ids[1:]) == "Once upon" and base.prompt_ids[0] == tokenizer.eos_token_id
    assert base.read == [] and "no system message" in base.note
    pieces = list(pool.stream("grpo", "Once upon", settings))
    assert pieces[0].text == "" and not any(piece.ended for piece in pieces[:-1]) and pieces[-1].ended
    assert "cut at max_new_tokens 3" in pieces[-1].note and len(pieces[-1].tokens) == 3
    again = last(pool.stream("grpo", "Once upon", settings))
    assert again.tokens == pieces[-1].tokens and isinstance(again.tokens[0], Drawn)


def test_at_most_keep_models_are_in_memory_and_none_that_is_in_use_goes(folders):
    pool = Pool(find(folders), keep=2)
    for name in ("one", "two", "three", "one"):
        assert last(pool.stream(name, "Hello", Settings(seed=0))).text == f"I am {name}."
        assert len(pool.loaded) <= 2
    first, second = (pool.stream(name, "Hello", Settings()) for name in ("one", "two"))
    assert next(first).text == next(second).text == ""
    with pytest.raises(UserError, match="--keep 2"):
        last(pool.stream("three", "Hello", Settings()))
    first.close()
    assert last(pool.stream("three", "Hello", Settings())).text == "I am three."
    assert set(pool.loaded) == {"two", "three"} and last(second).text == "I am two."


def test_two_threads_load_a_model_once_and_both_reply(folders, monkeypatch):
    from posttrain import serve

    loads, load = [], serve.load
    monkeypatch.setattr(serve, "load", lambda name: loads.append(name) or load(name))
    pool, said = Pool(find(folders[:1])), []
    threads = [
        threading.Thread(target=lambda: said.append(last(pool.stream("one", "Hello", Settings())).text))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == ["I am one."] * 4 and len(loads) == 1


@pytest.mark.parametrize(
    ("prompt", "settings", "says"),
    [
        ("x" * 20_001, Settings(), "20,001 characters"),
        ("x", Settings(system="x" * 20_001), "20,001 characters"),
        ("x", Settings(max_new_tokens=4097), "4096 at most"),
        ("x", Settings(temperature=float("nan")), "temperature"),
        ("x", Settings(seed=-1), "seed"),
        ([{"role": "assistant", "content": "x"}], Settings(), "does not end"),
        ([{"role": "user", "content": "x"}] * 201, Settings(), "201 messages"),
        ([{"role": "user", "content": "what is " * 2400}], Settings(), "context holds 512"),
    ],
)
def test_what_is_too_much_is_refused(folders, prompt, settings, says):
    pool = Pool(find(folders[:1]))
    with pytest.raises(UserError, match=says):
        last(pool.stream("one", prompt, settings))
    with pytest.raises(UserError, match="no stage is called"):
        last(pool.stream("../../etc/passwd", "x", Settings()))
