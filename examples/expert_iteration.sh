#!/bin/sh
# Expert iteration: a model samples solutions, learns its own right ones, and the better model samples the next
# round's. recipes/tiny/rejection.yaml trains the first model anew in each round, as STaR does (arXiv:2203.14465); here
# each round goes on from the last one's model. In: runs/tiny (`make demo`). Out: runs/examples/expert_iteration, with
# a table by round. More flags go on:
#     sh examples/expert_iteration.sh --num_rounds 5
# What came out: pass@1 on 100 held-out problems 43.2 % [40.1, 46.4] -> 83.5 -> 90.0 -> 90.8 % [88.3, 93.2] after
# rounds 1, 2 and 3, of 13,500 sampled solutions.
accelerate launch recipes/rejection.py --config recipes/tiny/rejection.yaml --start_from last \
    --output_dir runs/examples/expert_iteration "$@"
