"""Conversations -> the rows SFT trains on: encoded with a mask of what the assistant wrote, packed, collated.

In: rows with `messages` and a tokenizer with a template. Out: rows of exactly `max_length` tokens with position ids
that restart at each conversation, and labels that are -100 where nothing is learned.
"""

import torch

from posttrain.chat import encode_chat, end_of_turn_id
from posttrain.errors import UserError
from posttrain.packing import best_fit


def encode_rows(tokenizer, rows: list[dict], max_length: int, max_truncated: float) -> list[dict]:
    """[{"input_ids", "labels", "row"}]; labels are -100 where the assistant did not write. Checks what would fail
    in silence: UserError where nothing is supervised, an end of turn is not, or too many rows are cut."""
    end, encoded, cut = end_of_turn_id(tokenizer), [], 0
    for index, row in enumerate(rows):
        try:
            chat = encode_chat(tokenizer, row["messages"])
        except UserError as error:
            raise UserError(f"row {index}: {error}") from error
        supervised = [i for i, m in zip(chat.input_ids, chat.assistant_mask, strict=True) if m]
        replies = sum(m["role"] == "assistant" for m in row["messages"])
        if supervised.count(end) < replies or not replies:
            raise UserError(
                f"row {index}: {replies} assistant turns, but {supervised.count(end)} supervised end tokens "
                f"{tokenizer.convert_ids_to_tokens(end)!r}: the template must put each turn's content and end token "
                "inside {% generation %}, and every row needs an assistant turn"
            )
        labels = [i if m else -100 for i, m in zip(chat.input_ids, chat.assistant_mask, strict=True)]
        cut += len(labels) > max_length
        ids, labels = chat.input_ids[:max_length], labels[:max_length]
        labels[0] = -100  # in a packed row the token before it belongs to another conversation
        if any(label != -100 for label in labels):
            encoded.append({"input_ids": ids, "labels": labels, "row": index})
    if cut > max_truncated * len(rows):
        raise UserError(
            f"{cut} of {len(rows)} conversations are longer than max_length {max_length} and would lose their end; "
            f"raise max_length, shorten the rows, or allow it with max_truncated (now {max_truncated})"
        )
    if not encoded:
        raise UserError(f"no reply begins within max_length {max_length} tokens of its conversation: raise max_length")
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
    width, batch = max(len(row["input_ids"]) for row in rows), {}
    for key, fill in (("input_ids", pad_id), ("position_ids", 0), ("labels", -100)):
        batch[key] = torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])
    most = max(len(row["rows"]) for row in rows)
    batch["rows"] = torch.tensor([row["rows"] + [-1] * (most - len(row["rows"])) for row in rows])
    return batch
