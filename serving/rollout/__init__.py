"""Make the served versions match the desired ones: the reconciler, the four kinds of swap, and the journal."""
