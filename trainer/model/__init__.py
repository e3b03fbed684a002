"""The model that is trained: how it is loaded, and what is trainable in it."""
