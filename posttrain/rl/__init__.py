"""Reinforcement learning: one loop for PPO and GRPO. Start reading at `trainer.py`."""
