"""`posttrain eval MODEL`: figures with intervals of a reward model or of a base model.

In:  a model's folder or Hub name, and what to measure. Out: lines of name, figure, interval and count on stdout; with
     --json all of it, with the settings and versions that give the same figures again.
Run: posttrain eval runs/tiny/reward --data tiny --data_config rankings
     posttrain eval runs/tiny/pretrain --data tiny --data_config documents --train_data tiny    # bits per byte
     posttrain eval runs/tiny/pretrain --suite tiny
     posttrain eval runs/tiny/pretrain --few_shot examples/few_shot_facts.jsonl
     posttrain eval MODEL --regurgitation --train_data train.jsonl --data held_out.jsonl
     posttrain eval MODEL --tasks arc_easy --limit 100
"""

import argparse

from posttrain.errors import UserError

BASE_FLAGS = ("train_data", "few_shot", "suite", "regurgitation", "tasks")


def add_verb(verbs, debug: argparse.ArgumentParser) -> None:
    """The verb `eval` and its flags."""
    verb = verbs.add_parser("eval", parents=[debug], help="figures of a reward model, or of a base model")
    verb.set_defaults(call=lambda options: run(options))
    verb.add_argument("model", metavar="MODEL", help="folder of a model, or a name on the Hub")
    verb.add_argument("--data", metavar="NAME", help="held-out rows: rankings or pairs, texts for a base model")
    verb.add_argument("--data_config", metavar="NAME", help="as dataset_config")
    verb.add_argument("--data_adapter", metavar="NAME", help="as dataset_adapter")
    verb.add_argument("--split", default="test", help="split or slice; default: %(default)s")
    verb.add_argument("--rows", type=int, help="use so many; default: all")
    verb.add_argument("--max_length", type=int, default=1024, help="tokens; default: %(default)s, or the context")
    verb.add_argument("--seed", type=int, default=0, help="of tiny's world and of draws; default: %(default)s")
    verb.add_argument("--json", metavar="FILE", help="write all figures there, too")
    _add_base(verb.add_argument_group("base models"))
    _add_regurgitation(verb.add_argument_group("base models: training documents said again word for word"))
    _add_harness(verb.add_argument_group("base models: tasks of lm-evaluation-harness"))


def _add_base(group) -> None:
    group.add_argument(
        "--train_data", metavar="NAME", help="training texts: for --regurgitation, else for a byte trigram"
    )
    group.add_argument("--train_data_config", metavar="NAME", help="default: --data_config where the data is the same")
    group.add_argument("--train_data_adapter", metavar="NAME", help="likewise")
    group.add_argument("--train_split", default="train", help="split or slice; default: %(default)s")
    group.add_argument("--train_rows", type=int, help="use so many; default: all")
    group.add_argument("--suite", choices=("tiny",), help="the tiny world's: facts by how often they were read, sums")
    group.add_argument(
        "--few_shot", metavar="FILE", help="JSONL of input and output: the first rows are shown, all others asked"
    )
    group.add_argument("--num_fewshot", type=int, help="rows shown; default: 4, or what a task of --tasks says")
    group.add_argument("--max_tokens", type=int, default=64, help="answers are cut there; default: %(default)s")
    group.add_argument("--use_vllm", default="auto", choices=("auto", "true", "false"), help="default: %(default)s")


def _add_regurgitation(group) -> None:
    group.add_argument("--regurgitation", action="store_true", help="needs --train_data and --data")
    group.add_argument("--prefix_tokens", type=int, default=50, help="given of each document; default: %(default)s")
    group.add_argument("--continue_tokens", type=int, default=50, help="asked for; default: %(default)s")
    group.add_argument("--max_passages", type=int, default=200, help="asked of each group; default: %(default)s")


def _add_harness(group) -> None:
    group.add_argument("--tasks", metavar="A,B", help="names of tasks")
    group.add_argument("--include_path", metavar="DIR", help="a folder with task files (YAML) of your own")
    group.add_argument("--limit", type=int, help="rows of each task; default: all")
    group.add_argument("--batch_size", type=int, default=8, help="default: %(default)s")


def run(options) -> int:
    """Measure and print; returns the exit code 0. UserError for flags that do not fit the model."""
    from posttrain.models import load_config
    from posttrain.serve import check_folder

    check_folder(options.model)
    architectures = load_config(options.model).architectures or []
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        print(_reward(options))
    else:
        from posttrain import eval_base

        print(eval_base.report(options))
    return 0


def _reward(options) -> str:
    from posttrain import reward_eval
    from posttrain.data import DataConfig

    given = [f"--{name}" for name in BASE_FLAGS if getattr(options, name)]
    if given:
        raise UserError(
            f"{', '.join(given)}: for base models, but {options.model} is a reward model; use --data alone"
        )
    if options.data is None:
        raise UserError("--data: not given; a reward model is measured on rankings or pairs, such as --data tiny "
                        "--data_config rankings")  # fmt: skip
    data = DataConfig(options.data, options.data_config, dataset_adapter=options.data_adapter, max_rows=options.rows)
    return reward_eval.report_folder(
        options.model, data, options.split, seed=options.seed, max_length=options.max_length, file=options.json
    )
