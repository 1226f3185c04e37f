"""Stage 1, the tokenizer: texts in, a byte-level BPE tokenizer out.

accelerate launch recipes/tokenizer.py --config recipes/tiny/tokenizer.yaml [--vocab_size 2048]
Gain: bytes per token of held-out text against GPT-2's tokenizer cut to as many merges; `eval_goal: 0.1` aims at 10 %
more. `compare_tokenizers` names others; bytes per token by language and domain are printed, and drawn in the report.
`streaming: true` reads texts in bounded memory.
"""

from posttrain import evals, stage
from posttrain.args import parse, resolved
from posttrain.data import DataConfig
from posttrain.errors import entry
from posttrain.evals import EvalConfig
from posttrain.stage import StageConfig
from posttrain.tokenizer import Limited, TokenizerConfig, special_tokens, train_tokenizer
from posttrain.tokenizer_peers import require_names

ARGS = (StageConfig, DataConfig, EvalConfig, TokenizerConfig)


def check(argv, planned=()) -> dict:
    configs = own, source, held_out, config = parse(ARGS, argv)
    require_names(config.compare_tokenizers)
    evals.check_both(source, held_out, own.seed, ("text",), config.eval_columns)
    return resolved(*configs)


def main() -> None:
    configs = own, source, held_out, config = parse(ARGS, description=__doc__)
    require_names(config.compare_tokenizers)
    rows, test, sources = evals.load_or_stream(source, held_out, own.seed, ("text",), config.eval_columns)
    run = stage.start("tokenizer", configs, parents={}, data=sources)
    special, texts = special_tokens(config.special_tokens, config.reserved_tokens), Limited(rows, config)
    tokenizer = train_tokenizer(
        texts, config.vocab_size, split=config.split, special=special, min_frequency=config.min_frequency
    )
    texts.describe(sources[0])
    if len(tokenizer) < config.vocab_size:
        run.note(
            f"the text gave {len(tokenizer):,} tokens, fewer than vocab_size {config.vocab_size:,}: no pair is left"
        )

    from posttrain.tokenizer_report import measure, table

    others, goal = config.compare_tokenizers, held_out.eval_goal
    found = measure(tokenizer, len(special), test, config.eval_group_by, others, goal)
    run.note(f"{texts.facts['bytes']:,} bytes of text read\n{table(found['compression'])}")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in special}
    run.finish(tokenizer.save_pretrained, **found, vocab_size=len(tokenizer), special_ids=ids)


if __name__ == "__main__":
    entry(main)
