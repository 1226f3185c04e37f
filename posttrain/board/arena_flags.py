"""The arena's flags of `posttrain board`, and what they open.

In: flags. Out: the folder of the votes and the prompts to draw from. Nothing heavy is imported before it is needed.
Run: posttrain board runs/tiny --prompts_split train
     posttrain board runs/mine --prompts data/questions.jsonl --votes votes/second_round
"""

from pathlib import Path


def add_flags(verb) -> None:
    """What belongs to the arena alone."""
    verb.add_argument("--votes", metavar="DIR", help="where the arena's votes go; default: RUN/votes")
    verb.add_argument("--prompts", metavar="NAME", help="the arena draws from these rows: as dataset_name in a config")
    verb.add_argument("--prompts_config", metavar="NAME", help="as dataset_config")
    verb.add_argument("--prompts_adapter", metavar="NAME", help="as dataset_adapter")
    verb.add_argument(
        "--prompts_split", metavar="SPLIT", default="test", help="default: %(default)s, held-out prompts"
    )


def opened(options, entries) -> tuple:
    """(Votes, Prompts or None) as the flags say; without --prompts tiny's own, where a stage learned from tiny.

    Raises UserError where there are no such rows, or the votes' folder holds something else.
    """
    from posttrain.board import arena
    from posttrain.board.votes import Votes
    from posttrain.data import DataConfig

    run = Path(options.run)
    votes = Votes(options.votes or (run if run.is_dir() else Path()) / "votes")
    if options.prompts is None:
        return votes, arena.prompts_of(entries, options.prompts_split, votes)
    kinds = {"dataset_config": options.prompts_config, "dataset_adapter": options.prompts_adapter}
    data = DataConfig(dataset_name=options.prompts, max_rows=arena.MOST_PROMPTS, **kinds)
    return votes, arena.load_prompts(data, options.prompts_split, 0, votes)
