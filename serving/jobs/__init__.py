"""The queue of fine-tuning jobs, and the worker that trains them."""
