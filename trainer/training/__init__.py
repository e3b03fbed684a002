"""Supervised fine-tuning: the run itself, its loss and its checkpoints."""
