r"""Human feedback that closes the loop: rank here, train a reward model on the votes, run PPO with it, rank again.

    posttrain board runs/tiny --prompts_split train       # 1. Arena: draw a prompt, put the replies in order, vote
    posttrain ratings runs/tiny                           #    the stages' ratings so far
    accelerate launch recipes/reward.py --config examples/ranking_to_reward/reward.yaml    # 2. learns from the votes
    accelerate launch recipes/ppo.py --config examples/ranking_to_reward/ppo.yaml          # 3. learns from that
    posttrain board runs/tiny                             # 4. Arena again, on held-out prompts: is it better?

For a reward model that PPO shall learn from, choose one stage alone in the Arena, the chat model that PPO will start
from: its own samples are what the reward model has to tell apart. For ratings choose several stages.

A person needs an evening for the 600 rankings of step 1. This file stands in for one in the tiny world, whose true
utility is known: it asks the same stages through the same code and votes into the same files, as noisily as tiny's
labeller does.

    python examples/ranking_to_reward/labeller.py runs/tiny --stages sft --rows 600 --split train
    python examples/ranking_to_reward/labeller.py runs/tiny --stages sft ranked_ppo --replies 2 --rows 100 \
        --split test --votes runs/again

So run on 2026-11-26, one seed: the reward model puts 78 % [72, 85] of the pairs of 60 held-out votes in order; PPO
raises true utility on 200 held-out prompts from 1.21 [1.10, 1.32] to 2.57 [2.42, 2.73] at 3.2 nats of KL a reply; of
100 new votes it wins 73, loses 25 and ties 2: ratings 1093 [1056, 1134] and 907 [866, 944].

In: a run of recipes/tiny. Out: RUN/votes/votes.jsonl and votes.log, as `posttrain board` writes them.
"""

import argparse
import math
import random
from pathlib import Path

from posttrain.board import arena
from posttrain.board.stages import Pool, Settings, find
from posttrain.board.votes import Item, Votes
from posttrain.data import DataConfig, load_rows
from posttrain.data.tiny import LABELLER_TEMPERATURE, utility
from posttrain.errors import entry


def places_of(item: Item, row: dict, rng: random.Random) -> list[int]:
    """A place for each reply, 0 the best: true utility with Gumbel noise, which draws from Plackett-Luce (Yellott
    1977). Replies that are word for word the same are tied."""
    noisy = {}
    for text in dict.fromkeys(text for _, text in item.shown):
        gumbel = -math.log(-math.log(rng.random() or 1e-12))
        noisy[text] = utility(row["kind"], row["answer"], text) / LABELLER_TEMPERATURE + gumbel
    order = sorted(noisy, key=noisy.get, reverse=True)
    return [order.index(text) for _, text in item.shown]


def main() -> None:
    parser = argparse.ArgumentParser(description="A simulated labeller of the tiny world votes in a run's arena.")
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--stages", nargs="+", default=["sft"], help="one alone: its samples are ranked")
    parser.add_argument("--replies", type=int, default=4)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--split", default="train")
    parser.add_argument("--seed", type=int, default=0, help="of the world and of the noise")
    parser.add_argument("--votes", metavar="DIR", help="default: RUN/votes")
    options = parser.parse_args()
    pool, votes = Pool(find([options.run])), Votes(options.votes or Path(options.run) / "votes")
    data = DataConfig(dataset_name="tiny", dataset_config="prompts", max_rows=options.rows)
    rows, _ = load_rows(data, options.split, options.seed, ("prompt",))
    rng = random.Random(f"labeller {options.seed}")
    for number, row in enumerate(rows):
        settings = Settings(max_new_tokens=96, seed=1000 * number + options.seed)
        source = f"tiny (prompts), {options.split}"
        *_, item = arena.ask(pool, options.stages, options.replies, row["prompt"], settings, source)
        votes.vote(item, places_of(item, row, rng), labeller="simulated")
    print(f"{votes.counts()['standing']} votes stand in {votes.folder}")


if __name__ == "__main__":
    entry(main)
