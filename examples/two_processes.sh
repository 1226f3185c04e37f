#!/bin/sh
# Two processes: the same batches, each process half of them, gradients averaged. Only the launch line differs.
# In: runs/tiny/tokenizer (`make demo`). Out: runs/examples/two_processes, as runs/tiny/pretrain but for the last bits
# of sums in another order. On a machine with GPUs put ACCELERATE_USE_CPU=true in front. More flags go on:
#     sh examples/two_processes.sh --max_steps 20
accelerate launch --config_file recipes/accelerate/two_cpu_processes.yaml recipes/pretrain.py \
    --config recipes/tiny/pretrain.yaml --output_dir runs/examples/two_processes "$@"
