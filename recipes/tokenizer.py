"""Stage 1, the tokenizer: texts in, a byte-level BPE tokenizer out.

accelerate launch recipes/tokenizer.py --config recipes/tiny/tokenizer.yaml [--vocab_size 2048]"""

from dataclasses import dataclass

from posttrain import evals, intervals, stage
from posttrain.args import arg, parse, resolved
from posttrain.data import DataConfig
from posttrain.errors import entry
from posttrain.evals import EvalConfig
from posttrain.stage import StageConfig


@dataclass
class TokenizerConfig:
    """Tokenizer: size"""

    vocab_size: int = arg(1024, help="tokens, special ones and the 256 bytes included; an upper bound for little text")


ARGS = (StageConfig, DataConfig, EvalConfig, TokenizerConfig)


def check(argv, planned=()) -> dict:
    configs = own, source, held_out, _ = parse(ARGS, argv)
    evals.check_both(source, held_out, own.seed, ("text",))
    return resolved(*configs)


def main() -> None:
    configs = own, source, held_out, config = parse(ARGS, description=__doc__)
    rows, test, sources = evals.load_both(source, held_out, own.seed, ("text",))
    run = stage.start("tokenizer", configs, parents={}, data=sources)
    from posttrain.tokenizer import train_tokenizer

    tokenizer = train_tokenizer((row["text"] for row in rows), config.vocab_size)
    texts = [row["text"] for row in test]
    counts = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    sizes = [len(text.encode()) for text in texts]
    density = intervals.measured_ratio(sizes, counts, "bytes/token")
    run.finish(tokenizer.save_pretrained, metrics={"bytes per token": density}, vocab_size=len(tokenizer))


if __name__ == "__main__":
    entry(main)
