"""What SFT learns from: encoded rows, refusals, packed rows, and TRL's trainer on them.

Run: pytest tests/test_sft_encoding.py
"""

import json
import os
import signal
from copy import deepcopy

import pytest
import torch
from conftest import new_llama

from posttrain import stage
from posttrain.chat import end_of_turn_id
from posttrain.data import tiny
from posttrain.errors import UserError
from posttrain.packing import best_fit
from posttrain.sft import SFTConfig, make_trainer, train
from posttrain.sft_rows import collate, cut_rows, encode_chats, encode_rows, pack_rows
from posttrain.stage import StageConfig
from posttrain.training import OptimConfig

ROWS = list(tiny.rows("conversations", "train", 40, 0))


def learned(tokenizer, encoded):
    """The supervised text of a row."""
    return tokenizer.decode([label for label in encoded["labels"] if label != -100])


def test_labels_are_the_replies_with_their_end_tokens(tokenizer):
    encoded = encode_rows(tokenizer, ROWS, 256)
    assert [e["row"] for e in encoded] == list(range(40))
    for row, found in zip(ROWS, encoded, strict=True):
        replies = [m["content"] + "<|im_end|>" for m in row["messages"] if m["role"] == "assistant"]
        assert learned(tokenizer, found) == "".join(replies)
        assert found["input_ids"] == tokenizer.apply_chat_template(row["messages"])["input_ids"]
        assert all(label in (-100, i) for label, i in zip(found["labels"], found["input_ids"], strict=True))


def test_the_end_is_learned_where_pad_is_the_same_token(tokenizer):
    same = deepcopy(tokenizer)
    same.pad_token = same.eos_token
    (encoded,) = encode_rows(same, ROWS[:1], 256)
    assert encoded["labels"][-1] == end_of_turn_id(same) == same.pad_token_id


def test_rows_that_the_template_refuses_are_named(tokenizer):
    user = {"role": "user", "content": "hi"}
    for messages, words in (
        ([user, {"role": "gpt", "content": "hello"}], "row 1: .*unknown role 'gpt'"),
        ([user, {"role": "assistant", "content": None}], "row 1: the chat template refuses"),
    ):
        with pytest.raises(UserError, match=words):
            encode_rows(tokenizer, [ROWS[0], {"messages": messages}], 256)


def test_rows_are_cut_at_their_end_and_left_out_where_nothing_is_learned(tokenizer):
    whole, cut = encode_rows(tokenizer, ROWS, 256), encode_rows(tokenizer, ROWS, 24)
    assert max(len(e["input_ids"]) for e in cut) == 24
    kept = [e for e in whole if any(label != -100 for label in e["labels"][:24])]
    assert 0 < len(kept) < 40
    shortened = [{"input_ids": e["input_ids"][:24], "labels": e["labels"][:24], "row": e["row"]} for e in kept]
    assert cut == shortened
    with pytest.raises(UserError, match="no reply begins within max_length 5"):
        encode_rows(tokenizer, ROWS, 5)


def test_packed_rows(tokenizer):
    encoded = encode_rows(tokenizer, ROWS, 256)
    packed = pack_rows(encoded, 256, tokenizer.pad_token_id)
    assert sorted(i for row in packed for i in row["rows"]) == list(range(40)) and len(packed) < 40
    assert [row["rows"] for row in packed] == best_fit([len(e["input_ids"]) for e in encoded], 256)
    for row in packed:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) == 256
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        assert all(row["labels"][start] == -100 for start in starts)  # nothing predicts across a boundary
        used = sum(len(encoded[i]["input_ids"]) for i in row["rows"])
        ends = [*starts[1 : len(row["rows"])], used]
        for start, end, member in zip(starts, ends, row["rows"], strict=False):
            assert row["input_ids"][start:end] == encoded[member]["input_ids"]
            assert row["labels"][start:end] == encoded[member]["labels"]
            assert row["position_ids"][start:end] == list(range(end - start))
        assert set(row["input_ids"][used:]) <= {tokenizer.pad_token_id} and set(row["labels"][used:]) <= {-100}


def test_the_first_label_of_a_row_is_never_learned(tokenizer):
    """Even where a template begins with the assistant: its predecessor in a packed row is another conversation."""
    bare = deepcopy(tokenizer)
    bare.chat_template = (
        "{% for m in messages %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endfor %}"
    )
    (encoded,) = encode_rows(bare, [{"messages": [{"role": "assistant", "content": "yes"}]}], 256)
    assert encoded["labels"] == [-100, *encoded["input_ids"][1:]]


def test_row_numbers_travel_with_the_batch(tokenizer):
    packed = pack_rows(encode_rows(tokenizer, ROWS, 256), 256, tokenizer.pad_token_id)
    batch = collate(packed)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (len(packed), 256)
    assert [[i for i in row if i >= 0] for row in batch["rows"].tolist()] == [row["rows"] for row in packed]


def sft(folder, tokenizer, model, encoded, *, stop_at=None, **keys):
    """A stage that trains `model` in place for four steps."""
    own, optim = StageConfig(str(folder), logging_steps=1), OptimConfig(learning_rate=0.01, warmup_steps=1)
    config = SFTConfig(**{"max_length": 128, "max_steps": 4, "per_device_train_batch_size": 2, **keys})
    run = stage.start("sft", (own, config, optim), parents={}, data=[])
    log = run.log

    def log_and_stop(step, **numbers):
        log(step, **numbers)
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    run.log = log_and_stop
    return train(make_trainer(run, model, tokenizer, encoded, config, optim), run)


def logged(folder, key):
    return [json.loads(line)[key] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("restored_signals")
def test_the_loss_is_the_mean_over_assistant_tokens_however_they_are_batched(tokenizer, tmp_path):
    """Eight packed rows as 1 x 8 and as 8 x 1 micro-batches: the same loss and gradient norm, and that of a mean over
    the supervised tokens of conversations taken one by one."""
    encoded = encode_rows(tokenizer, ROWS, 128)
    packed = pack_rows(encoded, 128, tokenizer.pad_token_id)[:8]
    encoded = [e for e in encoded if e["row"] in {i for row in packed for i in row["rows"]}]
    assert len(pack_rows(encoded, 128, 0)) == 8
    model, losses, count = new_llama(tokenizer), [], 0
    for row in encoded:
        labels = torch.tensor([row["labels"]])
        number = (labels[:, 1:] != -100).sum().item()
        losses.append(model(torch.tensor([row["input_ids"]]), labels=labels).loss * number)
        count += number
    loss = sum(losses) / count
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    for size, steps in ((8, 1), (1, 8)):
        folder = tmp_path / f"{size}x{steps}"
        sft(
            folder, tokenizer, new_llama(tokenizer), encoded,
            max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=steps,
        )  # fmt: skip
        assert logged(folder, "loss") == pytest.approx([loss.item()], rel=1e-4)
        assert logged(folder, "grad_norm") == pytest.approx([norm], rel=1e-3)


@pytest.mark.usefixtures("restored_signals")
def test_sft_stopped_by_sigterm_ends_in_the_same_weights(tokenizer, tmp_path):
    encoded = encode_rows(tokenizer, ROWS, 128)
    straight, stopped, resumed = (new_llama(tokenizer) for _ in range(3))
    sft(tmp_path / "straight", tokenizer, straight, encoded)
    with pytest.raises(SystemExit) as left:
        sft(tmp_path / "stopped", tokenizer, stopped, encoded, stop_at=2)
    assert left.value.code == 143 and len(list((tmp_path / "stopped" / "checkpoints").iterdir())) == 1
    sft(tmp_path / "stopped", tokenizer, resumed, encoded)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters(), strict=True))
    assert not torch.equal(straight.lm_head.weight, stopped.lm_head.weight)
    assert logged(tmp_path / "stopped", "loss") == logged(tmp_path / "straight", "loss")


@pytest.mark.usefixtures("restored_signals")
def test_a_gradient_that_is_not_finite_stops_before_the_update(tokenizer, tmp_path):
    encoded, broken = encode_rows(tokenizer, ROWS, 128), new_llama(tokenizer)
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    before = [p.clone() for p in broken.parameters()]
    with pytest.raises(UserError, match=r"update 1: .*not finite; stopped before the update. Rows: \d+, \d+"):
        sft(tmp_path / "sft", tokenizer, broken, encoded)
    pairs = zip(before, broken.parameters(), strict=True)
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs)


def test_conversations_that_are_too_long_are_cut_or_left_out(tokenizer):
    chats = encode_chats(tokenizer, ROWS)
    sizes = [len(chat.input_ids) for chat in chats]
    limit = sorted(sizes)[len(sizes) // 2]
    kept = cut_rows(chats, limit, "leave_out")
    assert [row["row"] for row in kept] == [index for index, size in enumerate(sizes) if size <= limit]
    assert all(row["labels"][-1] == end_of_turn_id(tokenizer) for row in kept)
    assert any(row["labels"][-1] != end_of_turn_id(tokenizer) for row in cut_rows(chats, limit, "cut"))
