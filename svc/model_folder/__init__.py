"""A folder with a model, as the hub publishes it."""
