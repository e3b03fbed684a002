"""What was wrong with a training, in words, from its numbers."""
