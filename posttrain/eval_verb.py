"""`posttrain eval RUN|MODEL`: figures with intervals of a model or of all stages of a run.

In: a model's folder or Hub name, or a run, and what to measure. Out: a table on stdout; with --suite also
MODEL/evals/NAME.json and NAME.md; with --json all of it, with the settings and versions that give it again.
Run: posttrain eval runs/tiny --suite math                       # every stage, each against its parent
     posttrain eval MODEL --suite math --data gsm8k
     posttrain eval runs/tiny/ppo --suite chat --against runs/tiny/sft --reward runs/tiny/reward
     posttrain eval runs/tiny --suite think --budgets 0 8 16 32  # accuracy against tokens to think
     posttrain eval --again runs/tiny/grpo/evals/math.json       # the same figure again?
     posttrain eval runs/tiny/reward --data tiny --data_config rankings
     posttrain eval runs/tiny/pretrain --data tiny --data_config documents --train_data tiny    # bits per byte
     posttrain eval runs/tiny/pretrain --few_shot examples/few_shot_facts.jsonl --num_fewshot 0 1 4
     posttrain eval MODEL --regurgitation --train_data train.jsonl --data held_out.jsonl
     posttrain eval MODEL --tasks arc_easy --limit 100
"""

import argparse

from posttrain.errors import UserError
from posttrain.tools import flags

BASE_FLAGS = ("train_data", "few_shot", "suite", "regurgitation", "tasks")


def add_verb(verbs, debug: argparse.ArgumentParser) -> None:
    """The verb `eval` and its flags."""
    verb = verbs.add_parser("eval", parents=[debug], help="figures of a model, or of all stages of a run")
    verb.set_defaults(call=lambda options: run(options))
    add_flags(verb)


def add_flags(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("model", metavar="MODEL", nargs="?", help="folder of a model or a run, or a name on the Hub")
    verb.add_argument(
        "--suite", metavar="NAME", help="math, code, identity, chat, think, tools, spelling, base or tiny"
    )
    verb.add_argument(
        "--data", metavar="NAME", help="held-out rows; for --suite also gsm8k, math500, humaneval, mbpp of the Hub"
    )
    verb.add_argument("--data_config", metavar="NAME", help="as dataset_config")
    verb.add_argument("--data_adapter", metavar="NAME", help="as dataset_adapter")
    verb.add_argument("--split", help="split or slice; default: test")
    verb.add_argument("--rows", type=int, help="use so many; default: all")
    verb.add_argument("--max_length", type=int, default=1024, help="tokens; default: %(default)s, or the context")
    verb.add_argument("--seed", type=int, help="of tiny's world and of draws; default: the stage's own, else 0")
    verb.add_argument("--json", metavar="FILE", help="write all figures there, too")
    verb.add_argument("--again", metavar="FILE", help="measure a stored evaluation again; exit code 1 if it differs")
    _add_replies(verb.add_argument_group("suites of replies: math, code, identity, chat, think, tools, spelling"))
    flags.add_flags(verb.add_argument_group("suites of replies: tools"))
    _add_against(verb.add_argument_group("--suite chat: who decides"))
    _add_think(verb.add_argument_group("--suite think: tokens to think"))
    _add_base(verb.add_argument_group("base models"))
    _add_regurgitation(verb.add_argument_group("base models: training documents said again word for word"))
    _add_harness(verb.add_argument_group("base models: tasks of lm-evaluation-harness"))


def defaults() -> argparse.Namespace:
    """The flags' own defaults."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return parser.parse_args([])


def _add_replies(group) -> None:
    group.add_argument(
        "--num_generations",
        type=int,
        help="replies a prompt; default: math, code, think, tools 8, identity 4, others 1",
    )
    group.add_argument("--temperature", type=float, help="0 is greedy; default: 1")
    group.add_argument("--top_p", type=float, help="nucleus sampling; default: 1, all tokens")
    group.add_argument("--top_k", type=int, help="of the likeliest tokens; default: 0, all")
    group.add_argument("--max_tokens", type=int, help="replies are cut there; default: by suite; --few_shot: 64")
    group.add_argument("--sample_seed", type=int, help="of the replies; default: that of the stages' own evaluations")
    group.add_argument("--system", metavar="TEXT", help="system message before each prompt")
    group.add_argument("--reward_funcs", nargs="*", metavar="NAME", help="more reward functions, each a figure")
    group.add_argument(
        "--identity", metavar="FILE", help="identity.yaml of --suite identity; default: the stage's own"
    )


def _add_against(group) -> None:
    group.add_argument("--against", metavar="MODEL", help="another model, asked the same")
    group.add_argument("--reward", metavar="FOLDER", help="a reward model scores the replies")
    group.add_argument("--judge", metavar="URL", help="an OpenAI-compatible server, up to /v1, reads both orders")
    group.add_argument("--judge_model", metavar="NAME", help="the judge's name there")
    group.add_argument("--judge_api_key_env", metavar="NAME", help="environment variable with its key")
    group.add_argument("--judge_cache", metavar="FILE", help="JSONL of its answers, asked for once")


def _add_think(group) -> None:
    group.add_argument(
        "--budgets", type=int, nargs="+", metavar="N", help="think so many tokens at most; default: powers of two"
    )
    group.add_argument(
        "--at_least", type=int, nargs="+", metavar="N", help="think so many at least, by --go_on; default: none"
    )
    group.add_argument("--at_once", metavar="TEXT", help="opens an answer; default: the stage's, or 'The answer is'")
    group.add_argument("--in_steps", metavar="TEXT", help="opens thoughts; default: likewise, or a call for steps")
    group.add_argument("--steps_system", metavar="TEXT", help="system message of the replies that think")
    group.add_argument("--answer", metavar="TEXT", help="put behind thoughts that are cut; default: the template's "
                       "closing tag or a break, then --at_once")  # fmt: skip
    group.add_argument("--answer_tokens", type=int, help="at most, of an answer at once or behind a cut; default: 32")
    group.add_argument("--go_on", metavar="TEXT", help="put where thoughts would end too early; default: ' Wait'")


def _add_base(group) -> None:
    group.add_argument(
        "--train_data", metavar="NAME", help="training texts: for --regurgitation, else for a byte trigram"
    )
    group.add_argument("--train_data_config", metavar="NAME", help="default: --data_config where the data is the same")
    group.add_argument("--train_data_adapter", metavar="NAME", help="likewise")
    group.add_argument("--train_split", default="train", help="split or slice; default: %(default)s")
    group.add_argument("--train_rows", type=int, help="use so many; default: all")
    group.add_argument(
        "--few_shot", metavar="FILE", help="JSONL of input and output: the first rows are shown, all others asked"
    )
    group.add_argument(
        "--num_fewshot", type=int, nargs="+", metavar="N",
        help="rows shown, several numbers for a curve; default: 4, or what a task of --tasks says",
    )  # fmt: skip
    group.add_argument(
        "--few_shot_format", metavar="TEXT",
        help=r"such as 'Human: {input}\nAssistant: {output}'; default: '{input} {output}'",
    )  # fmt: skip
    group.add_argument("--as_turns", action="store_true", help="of a chat model: examples and question as turns")
    group.add_argument(
        "--similarity", nargs="+", choices=("chrf", "bleu"), help="how near answers are to the outputs; needs [eval]"
    )
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
    """Measure and print; returns the exit code: 0, or 1 where --again found another figure. UserError for flags that
    do not fit the model."""
    if options.again is not None:
        from posttrain import eval_again

        said, agree = eval_again.run(options)
        print(said)
        return 0 if agree else 1
    if options.model is None:
        raise UserError("MODEL: not given; name a model's folder, a run, or a stored evaluation with --again")
    if options.suite is not None:
        from posttrain import suites

        print(suites.run(options))
        return 0
    return _without_suite(options)


def _without_suite(options) -> int:
    from posttrain.models import load_config
    from posttrain.serve import check_folder
    from posttrain.suite_settings import SUITES, THINK_FLAGS, is_run

    given = [f"--{flag}" for flag in THINK_FLAGS if getattr(options, flag) is not None]
    if given:
        raise UserError(f"{', '.join(given)}: works with --suite think; add that or leave it out")
    if options.tools:
        raise UserError("--tools: works with a suite of replies, such as --suite tools; add one or leave it out")
    if is_run(options.model):
        raise UserError(f"{options.model} is a run: add --suite {', '.join(SUITES)}, or name one of its stages")
    check_folder(options.model)
    options.seed, options.split = options.seed or 0, options.split or "test"
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
