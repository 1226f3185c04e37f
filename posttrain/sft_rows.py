"""Conversations -> the rows SFT trains on: encoded with a mask of what the assistant wrote, packed, collated.

In: rows with `messages` and a tokenizer with a template. Out: rows of exactly `max_length` tokens with position ids
that restart at each conversation, and labels that are -100 where nothing is learned.
"""

import torch

from posttrain import gate
from posttrain.chat import EncodedChat, encode_chat
from posttrain.errors import UserError
from posttrain.packing import best_fit


def gated_rows(run, tokenizer, model, rows: list[dict], config) -> list[dict]:
    """`encode_rows` of what a stage is about to train on, once the gate has let it pass; config: SFTConfig."""
    chats = encode_chats(tokenizer, rows)
    gate.require(run, gate.sft_checks(tokenizer, model, rows, chats, config, run.parents))
    return cut_rows(chats, config.max_length, config.too_long)


def encode_rows(tokenizer, rows: list[dict], max_length: int) -> list[dict]:
    """[{"input_ids", "labels", "row"}] of at most `max_length` tokens; labels are -100 where the assistant did not
    write. A row with no label left is left out; UserError where none has one."""
    return cut_rows(encode_chats(tokenizer, rows), max_length)


def encode_chats(tokenizer, rows: list[dict]) -> list[EncodedChat]:
    """Each row's conversation in tokens, whole. UserError naming the row that the template refuses.

    A row that brings both `input_ids` and `assistant_masks`, as transformers' `apply_chat_template` returns them, is
    taken as it is; the gate compares it with its messages.
    """
    chats = []
    for index, row in enumerate(rows):
        try:
            chats.append(_own_tokens(tokenizer, row) if "input_ids" in row else _encoded(tokenizer, row))
        except UserError as error:
            raise UserError(f"row {index}: {error}") from error
    return chats


def _encoded(tokenizer, row: dict) -> EncodedChat:
    return encode_chat(tokenizer, row["messages"], tools=row.get("tools"))


def _own_tokens(tokenizer, row: dict) -> EncodedChat:
    ids, mask = row["input_ids"], row.get("assistant_masks")
    numbers = all(isinstance(i, int) and 0 <= i < len(tokenizer) for i in ids)
    if not isinstance(mask, list) or len(mask) != len(ids) or not numbers or not set(mask) <= {0, 1}:
        raise UserError(
            f"column input_ids: expected ids below {len(tokenizer)} and a column assistant_masks with a 0 or 1 for "
            "each (apply_chat_template gives both with return_assistant_tokens_mask=True), or neither column"
        )
    return EncodedChat(list(ids), list(mask))


def cut_rows(chats: list[EncodedChat], max_length: int, too_long: str = "cut") -> list[dict]:
    """As `encode_rows`, of encoded conversations; too_long: "cut" the longer ones at their end, or "leave_out"."""
    encoded = []
    for index, chat in enumerate(chats):
        if too_long == "leave_out" and len(chat.input_ids) > max_length:
            continue
        ids, mask = chat.input_ids[:max_length], chat.assistant_mask[:max_length]
        labels = [i if m else -100 for i, m in zip(ids, mask, strict=True)]
        labels[:1] = [-100] * len(labels[:1])  # in a packed row the token before it belongs to another conversation
        if any(label != -100 for label in labels):
            encoded.append({"input_ids": ids, "labels": labels, "row": index})
    if not encoded:
        raise UserError(
            f"no row is left to learn from: no reply begins within max_length {max_length} tokens of its "
            "conversation: raise max_length, or mend the rows' masks"
        )
    return encoded


def pack_rows(encoded: list[dict], width: int, pad_id: int) -> list[dict]:
    """Rows of exactly `width` tokens: {"input_ids", "position_ids", "labels", "rows"}; see posttrain/packing.py."""
    packed = []
    for members in best_fit([len(e["input_ids"]) for e in encoded], width):
        row = {"input_ids": [], "position_ids": [], "labels": [], "rows": [encoded[i]["row"] for i in members]}
        for member in members:
            row["input_ids"] += encoded[member]["input_ids"]
            row["labels"] += encoded[member]["labels"]
            row["position_ids"] += range(len(encoded[member]["input_ids"]))
        rest = width - len(row["input_ids"])
        row["input_ids"] += [pad_id] * rest
        row["labels"] += [-100] * rest
        row["position_ids"] += range(rest)
        packed.append(row)
    return packed


def single_rows(encoded: list[dict]) -> list[dict]:
    """One conversation a row, of its own length: for attention that cannot keep packed conversations apart."""
    return [{**e, "position_ids": list(range(len(e["input_ids"]))), "rows": [e["row"]]} for e in encoded]


def collate(rows: list[dict], pad_id: int = 0) -> dict:
    """Tensors (B, longest row), padded on the right, and `rows` (B, most conversations in a row; -1 where fewer) to
    name them in an error. No attention mask: causal attention never looks right, and no label stands on a pad."""
    width, batch = max(len(row["input_ids"]) for row in rows), {}
    for key, fill in (("input_ids", pad_id), ("position_ids", 0), ("labels", -100)):
        batch[key] = torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])
    most = max(len(row["rows"]) for row in rows)
    batch["rows"] = torch.tensor([row["rows"] + [-1] * (most - len(row["rows"])) for row in rows])
    return batch
