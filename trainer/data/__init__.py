"""Examples as a model sees them: token ids, packed rows, and their order."""
