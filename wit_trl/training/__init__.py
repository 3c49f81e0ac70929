"""What the trainer is made of: metrics, parallelism, checkpoints, the model card."""
