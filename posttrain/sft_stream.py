"""Rows of SFT made while training, from conversations that do not fit in memory (`streaming: true`).

In: a `Stream` of conversations, read again for every epoch. Out: an endless data set of rows as `sft_rows` makes them;
the same rows in the same order for the same seed, so that a resumed run skips to exactly where it was.
"""

import random
from collections.abc import Iterator
from itertools import count, islice

from posttrain import gate
from posttrain.data.stream import Stream, shuffled
from posttrain.errors import UserError
from posttrain.sft_rows import cut_rows, encode_chats, gated_rows, pack_rows, single_rows


def gated(run, tokenizer, model, rows: list[dict] | Stream, config):
    """What to train on once the gate has let it pass: encoded rows, or for a stream a `RowStream`. The gate sees all
    rows of a list; of a stream the first `stream_buffer` before training, and then each part as it comes."""
    if not isinstance(rows, Stream):
        return gated_rows(run, tokenizer, model, rows, config)
    gated_rows(run, tokenizer, model, list(islice(rows, config.stream_buffer)), config)
    return RowStream(rows, tokenizer, config, run.config["seed"], run.config["allow"], run.data[0])


class RowStream:
    """Conversations are shuffled through a buffer of `stream_buffer`; so many at a time pass the gate, are encoded and
    packed, and their rows come in an order of their own. `rows` of a row are places in the stream, counted from 0;
    `facts`, the stream's entry in the manifest, is told what was left out so far."""

    def __init__(self, stream: Stream, tokenizer, config, seed: int, allow: list[str], facts: dict):
        self.stream, self.tokenizer, self.config, self.seed, self.allow = stream, tokenizer, config, seed, allow
        self.facts = facts

    def __iter__(self) -> Iterator[dict]:
        conversations, width = self._conversations(), self.config.max_length
        for number in count():
            places, rows = zip(*islice(conversations, self.config.stream_buffer), strict=True)
            chats = encode_chats(self.tokenizer, list(rows))
            self._require(rows, chats, places)
            self.facts |= self.stream.description()
            encoded = [{**each, "row": places[each["row"]]} for each in cut_rows(chats, width, self.config.too_long)]
            pad_id = self.tokenizer.pad_token_id or 0
            ready = pack_rows(encoded, width, pad_id) if self.config.packing else single_rows(encoded)
            random.Random(f"rows-{self.seed}-{number}").shuffle(ready)
            yield from ready

    def __getstate__(self) -> dict:
        """What `datasets` names a data set by: open files and tokenizers are not to be pickled for that."""
        return {"seed": self.seed, "data": self.facts["sha256"]}

    def dataset(self):
        """As TRL takes it."""
        import datasets

        return datasets.IterableDataset.from_generator(self.__iter__)

    def _require(self, rows, chats, places) -> None:
        checks = gate.sft_checks(self.tokenizer, None, list(rows), chats, self.config, {})
        refused = {name: said for name, said in checks.items() if said and name not in self.allow}
        if refused:
            where = f"of {len(rows)} streamed conversations, of which row 0 is number {places[0]} of the data"
            raise UserError(f"{where}: {gate.refusal(refused)}")

    def _conversations(self) -> Iterator[tuple[int, dict]]:
        """(place in the stream, conversation), epoch after epoch without end."""
        numbered = Stream(lambda: enumerate(self.stream))
        for epoch in count():
            yield from shuffled(numbered, self.config.stream_buffer, self.seed, epoch)
