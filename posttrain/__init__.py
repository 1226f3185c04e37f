"""A post-training toolkit: pretrain, SFT, reward model, PPO and GRPO, one recipe and one folder a stage."""

__version__ = "0.1.0"
