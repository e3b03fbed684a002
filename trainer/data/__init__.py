"""Examples in the form that a model trains on: token ids, packed rows, and their order."""
