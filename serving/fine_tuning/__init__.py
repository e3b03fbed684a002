"""The queue of fine-tuning jobs, and the worker that runs them."""
