"""The `posttrain` command: thin, each verb calls one function.

    posttrain run recipes/tiny [--out DIR] [--from STAGE | --only STAGE] [--set KEY=VALUE] [--seeds 0 1 2] [--dry-run]
    posttrain inspect --config recipes/tiny/sft.yaml [--KEY VALUE ...] [--rows N] [--html FILE] [--against TOKENIZER]
    posttrain forecast recipes/tiny/pretrain.yaml [--KEY VALUE ...] [--price DOLLARS] [--gpus N] [--no-measure]
    posttrain report runs/tiny [--against runs/other] [--price DOLLARS] [--picture FILE.svg]
    posttrain doctor runs/tiny
    posttrain chat runs/tiny/grpo [--prompt TEXT] [--tools NAME ... --tool_options JSON]
    posttrain complete runs/tiny/pretrain --prompt TEXT [--n 3] [--few_shot FILE] [--probs]
    posttrain board runs/tiny [MODEL ...] [--port 7860]
    posttrain serve runs/tiny/sft [--port 8000]
    posttrain eval runs/tiny/reward --data tiny --data_config rankings [--json FILE]
    posttrain eval RUN|MODEL --suite math|code|identity|chat|base|tiny [--data NAME] [--against MODEL] | --again FILE
    posttrain eval runs/tiny/pretrain --tasks A,B | --regurgitation ... [--json FILE]
    posttrain ratings runs/tiny
    posttrain push runs/tiny/grpo --repo user/name [--public] [--license NAME] [--dry_run]
    posttrain bestof --model runs/tiny/sft --reward runs/tiny/reward --n 16 --data tiny --data_config prompts
    posttrain attack-reward my_rewards.short [--options KEY=VALUE ...] [--tokenizer PATH] [--timeout S]
    posttrain template list | show NAME | check FILE [--tokenizer PATH] | diff A B
    posttrain export MODEL --format gguf|merged [--dtype f32|f16|bf16|q8_0] [--out DIR]
    posttrain check-export MODEL GGUF [--engines hf vllm gguf]
    posttrain env

In: command-line arguments. Out: what the verb prints; exit code 0, 1 where a check found faults, 2 for an error the
user can mend, 128 + n after signal n.
"""

import argparse

from posttrain.board.app import add_verb as add_board
from posttrain.board.rating_view import add_verb as add_ratings
from posttrain.check_export import add_verb as add_check_export
from posttrain.complete import add_verb as add_complete
from posttrain.errors import entry
from posttrain.eval_verb import add_verb as add_eval
from posttrain.export import add_verb as add_export
from posttrain.forecast import add_verb as add_forecast
from posttrain.forecast import call as call_forecast
from posttrain.hub import add_verb as add_push
from posttrain.report_verb import add_verb as add_report
from posttrain.serve_engine import add_verb as add_serve
from posttrain.tools import flags as tool_flags


def main() -> None:
    """Entry point of the console script."""
    entry(lambda: command(None))


def command(argv: list[str] | None) -> int:
    """Parse argv (None: the process's own) and call the verb; returns the exit code."""
    top = parser()
    options, options.rest = top.parse_known_args(argv)
    if options.rest and options.call not in (call_inspect, call_forecast):
        top.error(f"unrecognized arguments: {' '.join(options.rest)}")
    return options.call(options)


def parser() -> argparse.ArgumentParser:
    """The verbs and their flags."""
    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the traceback of an error")
    top = argparse.ArgumentParser(
        prog="posttrain", description="The whole post-training chain of a language model.", parents=[debug]
    )
    verbs = top.add_subparsers(title="verbs", metavar="VERB", required=True)

    run = verbs.add_parser("run", parents=[debug], help="run a folder of stages in order, skipping what is finished")
    run.set_defaults(call=call_run)
    run.add_argument("chain", metavar="FOLDER", help="a folder with chain.yaml and a YAML a stage, e.g. recipes/tiny")
    run.add_argument("--out", metavar="DIR", help="where the stages go, in place of the chain's own folder")
    part = run.add_mutually_exclusive_group()
    part.add_argument(
        "--from", dest="start_from", metavar="STAGE", help="run this stage and all after it, finished or not"
    )
    part.add_argument("--only", metavar="STAGE", help="run this stage, finished or not, and no other")
    run.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="for every stage that has the key; stage.key=value for one stage; can be given several times",
    )
    run.add_argument(
        "--seeds", type=int, nargs="+", metavar="N", help="run the chain once a seed and average the gains"
    )
    run.add_argument(
        "--dry-run", action="store_true", help="check every stage's config, data and parents; train nothing"
    )
    run.add_argument(
        "--accelerate_config", metavar="FILE", help="for `accelerate launch`: FSDP, DeepSpeed, several nodes"
    )

    add_inspect(verbs, debug)
    add_forecast(verbs, debug)

    add_report(verbs, debug)
    _add_doctor(verbs, debug)
    _add_chat(verbs, debug)
    add_complete(verbs, debug)
    add_board(verbs, debug)
    add_serve(verbs, debug)
    add_eval(verbs, debug)
    add_push(verbs, debug)
    add_export(verbs, debug)
    add_check_export(verbs, debug)
    add_ratings(verbs, debug)
    _add_bestof(verbs, debug)
    _add_attack(verbs, debug)
    add_template(verbs, debug)

    env = verbs.add_parser("env", parents=[debug], help="versions, devices, what is missing and how to get it")
    env.set_defaults(call=call_env)
    return top


def add_inspect(verbs, debug: argparse.ArgumentParser) -> None:
    look = verbs.add_parser(
        "inspect", parents=[debug], help="rows as tokens, and what the gate says of them", allow_abbrev=False,
        epilog="Every other --KEY VALUE is a key of the stage's config.",
    )  # fmt: skip
    look.set_defaults(call=call_inspect)
    look.add_argument("--config", metavar="FILE", help="YAML of a stage: sft, reward, ppo or grpo")
    look.add_argument("--stage", metavar="NAME", help="the stage, where the file is not named after it")
    look.add_argument("--data", metavar="PATH", help="in place of a config: a data set ...")
    look.add_argument("--model", metavar="PATH", help="... and a model, or a folder with a tokenizer alone")
    look.add_argument("--template", metavar="FILE", help="with --data: the chat template")
    look.add_argument("--rows", type=int, default=2, metavar="N", help="show the first N; default: %(default)s")
    look.add_argument("--html", metavar="FILE", help="write them as a page, too")
    look.add_argument("--against", metavar="TOKENIZER", help="show the same text under another tokenizer")


def add_template(verbs, debug) -> None:
    """The verb `template` and its actions."""
    template = verbs.add_parser("template", parents=[debug], help="list, show, check or compare chat templates")
    actions = template.add_subparsers(title="actions", metavar="ACTION", required=True, dest="action")
    actions.add_parser("list", parents=[debug], help="a line a template: what it renders")
    show = actions.add_parser("show", parents=[debug], help="its source and a conversation, what is learned marked")
    show.add_argument("name", metavar="NAME", help="a name of the list, or a file")
    check = actions.add_parser("check", parents=[debug], help="all that is wrong with it; exit code 1 if anything is")
    check.add_argument("name", metavar="FILE", help="a file, or a name of the list")
    check.add_argument("--tokenizer", metavar="PATH", help="folder or Hub name; default: a small one made for it")
    diff = actions.add_parser("diff", parents=[debug], help="where the renders of two differ")
    diff.add_argument("left", metavar="A", help="a name, a file, or a folder with a tokenizer")
    diff.add_argument("right", metavar="B", help="likewise")
    template.set_defaults(call=call_template)


def _add_doctor(verbs, debug: argparse.ArgumentParser) -> None:
    doctor = verbs.add_parser("doctor", parents=[debug], help="what looks wrong in the logs of a stage or a run")
    doctor.set_defaults(call=call_doctor)
    doctor.add_argument("run", metavar="RUN", help="folder of a stage or a run, finished or not, e.g. runs/tiny")


def _add_chat(verbs, debug: argparse.ArgumentParser) -> None:
    chat = verbs.add_parser("chat", parents=[debug], help="talk to a model")
    chat.set_defaults(call=call_chat)
    chat.add_argument("model", metavar="MODEL", help="folder of a stage, or a name on the Hub")
    chat.add_argument("--prompt", metavar="TEXT", help="answer this and leave")
    chat.add_argument("--system", metavar="TEXT", help="system message")
    chat.add_argument("--raw", action="store_true", help="show the tokens")
    chat.add_argument("--temperature", type=float, default=1.0, help="0 is greedy; default: %(default)s")
    chat.add_argument("--top_p", type=float, default=1.0, help="nucleus sampling; default: %(default)s, all tokens")
    chat.add_argument("--max_new_tokens", type=int, default=256, help="default: %(default)s")
    chat.add_argument("--seed", type=int, help="default: another one each time")
    tool_flags.add_flags(chat.add_argument_group("tools"))


def _add_bestof(verbs, debug: argparse.ArgumentParser) -> None:
    best = verbs.add_parser("bestof", parents=[debug], help="what the reward model's favourite of n replies is worth")
    best.set_defaults(call=call_bestof)
    best.add_argument("--model", required=True, help="the chat model that is sampled")
    best.add_argument("--reward", required=True, help="the reward model that picks")
    best.add_argument("--n", type=int, default=16, help="replies to each prompt; default: %(default)s")
    best.add_argument("--data", required=True, metavar="NAME", help="rows with prompts: as dataset_name in a config")
    best.add_argument("--data_config", metavar="NAME", help="as dataset_config")
    best.add_argument("--data_adapter", metavar="NAME", help="as dataset_adapter")
    best.add_argument("--split", default="test", help="split or slice; default: %(default)s")
    best.add_argument("--rows", type=int, default=100, help="prompts; default: %(default)s")
    best.add_argument("--judge", nargs="*", metavar="NAME", help="reward functions; default: tiny_utility on tiny")
    best.add_argument("--max_tokens", type=int, default=96, help="replies are cut there; default: %(default)s")
    best.add_argument("--seed", type=int, default=0, help="of the world and of the samples; default: %(default)s")
    best.add_argument("--use_vllm", default="auto", choices=("auto", "true", "false"), help="default: %(default)s")
    best.add_argument("--out", metavar="DIR", help="default: bestof/ in the reward model's folder, if that is one")


def _add_attack(verbs, debug: argparse.ArgumentParser) -> None:
    attack = verbs.add_parser(
        "attack-reward", parents=[debug], help="known hacks on a reward; exit code 1 if any passes"
    )
    attack.set_defaults(call=call_attack)
    attack.add_argument("name", metavar="NAME", help="a reward's short name, or a dotted path package.module.function")
    attack.add_argument("--options", nargs="*", default=[], metavar="KEY=VALUE", help="as in reward_options")
    attack.add_argument("--tokenizer", metavar="PATH", help="for rewards that read tokens; default: a token is a byte")
    attack.add_argument("--timeout", type=float, default=60.0, metavar="S", help="of a hack; default: %(default)s s")


def call_run(options: argparse.Namespace) -> int:
    from posttrain import chain, seeds

    shared = {
        "start_from": options.start_from,
        "only": options.only,
        "dry_run": options.dry_run,
        "debug": options.debug,
        "accelerate_config": options.accelerate_config,
    }
    if options.seeds is None:
        return chain.run(options.chain, options.out, overrides=options.overrides, **shared)
    return seeds.run(options.chain, options.seeds, options.out, overrides=options.overrides, **shared)


def call_inspect(options: argparse.Namespace) -> int:
    from posttrain import inspect

    return inspect.run(
        options.config,
        options.rest,
        stage_name=options.stage,
        data=options.data,
        model=options.model,
        template=options.template,
        rows=options.rows,
        html=options.html,
        against=options.against,
    )


def call_doctor(options: argparse.Namespace) -> int:
    from posttrain import doctor

    print(doctor.tell(options.run))
    return 0


def call_chat(options: argparse.Namespace) -> int:
    from posttrain import serve

    tools, limits = tool_flags.loaded(options)
    return serve.chat(
        options.model,
        prompt=options.prompt,
        system=options.system,
        raw=options.raw,
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        tools=tools,
        limits=limits,
    )


def call_bestof(options: argparse.Namespace) -> int:
    from pathlib import Path

    from posttrain import bestof
    from posttrain.data import DataConfig

    data = DataConfig(
        dataset_name=options.data,
        dataset_config=options.data_config,
        dataset_adapter=options.data_adapter,
        max_rows=options.rows,
    )
    beside = Path(options.reward) / "bestof" if Path(options.reward).is_dir() else Path("bestof")
    bestof.run(
        options.model,
        options.reward,
        options.n,
        data,
        options.split,
        judges=options.judge,
        out=Path(options.out) if options.out else beside,
        max_tokens=options.max_tokens,
        seed=options.seed,
        use_vllm=options.use_vllm,
    )
    return 0


def call_template(options: argparse.Namespace) -> int:
    from posttrain import template_view as view

    if options.action == "check":
        report, sound = view.check(options.name, options.tokenizer)
        print(report)
        return 0 if sound else 1
    if options.action == "diff":
        print(view.diff(options.left, options.right))
    else:
        print(view.listing() if options.action == "list" else view.show(options.name))
    return 0


def call_attack(options: argparse.Namespace) -> int:
    from posttrain.rewards import attack

    given = attack.read_options(options.options)
    return attack.run(options.name, given, tokenizer=options.tokenizer, timeout=options.timeout)


def call_env(_options: argparse.Namespace) -> int:
    from posttrain import environment

    print(environment.report())
    return 0


if __name__ == "__main__":
    main()
