"""The `posttrain` command: thin, each verb calls one function.

    posttrain run recipes/tiny [--out DIR] [--from STAGE | --only STAGE] [--set KEY=VALUE] [--seeds 0 1 2] [--dry-run]
    posttrain report runs/tiny
    posttrain chat runs/tiny/grpo [--prompt TEXT]
    posttrain env

In: command-line arguments. Out: what the verb prints; exit code 0, 2 for an error the user can mend, 128 + n after
signal n.
"""

import argparse

from posttrain.errors import entry


def main() -> None:
    """Entry point of the console script."""
    entry(lambda: command(None))


def command(argv: list[str] | None) -> int:
    """Parse argv (None: the process's own) and call the verb; returns the exit code."""
    options = parser().parse_args(argv)
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

    report = verbs.add_parser("report", parents=[debug], help="write report.html of a run again and print the gains")
    report.set_defaults(call=call_report)
    report.add_argument("run", metavar="RUN", help="folder of a run, e.g. runs/tiny")

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

    env = verbs.add_parser("env", parents=[debug], help="versions, devices, what is missing and how to get it")
    env.set_defaults(call=call_env)
    return top


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


def call_report(options: argparse.Namespace) -> int:
    from pathlib import Path

    from posttrain import report

    run = Path(options.run)
    path = report.write_report(run)
    print(f"{report.gains_table(run)}\n\nreport  {path}")
    return 0


def call_chat(options: argparse.Namespace) -> int:
    from posttrain import serve

    return serve.chat(
        options.model,
        prompt=options.prompt,
        system=options.system,
        raw=options.raw,
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
    )


def call_env(_options: argparse.Namespace) -> int:
    from posttrain import environment

    print(environment.report())
    return 0


if __name__ == "__main__":
    main()
