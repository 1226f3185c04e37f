#!/bin/sh
# LoRA PPO: adapters alone are trained, at ten times the rate; the reference is the same model with its adapters off.
# In: runs/tiny (`make demo`). Out: runs/examples/lora_ppo, merged, and its adapter apart in adapter/. Further flags go on:
#     sh examples/lora_ppo.sh --lora_r 4
accelerate launch recipes/ppo.py --config recipes/tiny/ppo.yaml --use_peft --learning_rate 2e-3 \
    --output_dir runs/examples/lora_ppo "$@"
