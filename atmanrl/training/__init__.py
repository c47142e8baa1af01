"""Training: the trainer, its configuration, rewards, checkpoints and runs."""
