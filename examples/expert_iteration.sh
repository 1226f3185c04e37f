#!/bin/sh
# Expert iteration: a model samples solutions, learns its own right ones, and the better model samples the next round's.
# recipes/tiny/rejection.yaml trains the first model anew in each round, as STaR does (arXiv:2203.14465); here each round
# goes on from the last one's model. In: runs/tiny (`make demo`). Out: runs/examples/expert_iteration, with a table by
# round. Further flags go on:
#     sh examples/expert_iteration.sh --num_rounds 5
accelerate launch recipes/rejection.py --config recipes/tiny/rejection.yaml --start_from last \
    --output_dir runs/examples/expert_iteration "$@"
