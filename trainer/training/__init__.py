"""Supervised fine-tuning: the training run itself, its loss and its checkpoints."""
