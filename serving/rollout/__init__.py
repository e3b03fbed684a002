"""Makes what serves equal to what is desired: the reconciler, the three kinds of swap, and their journal."""
