"""Makes what serves equal to what is desired: the reconciler, the four kinds of swap, and their journal."""
