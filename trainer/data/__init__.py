"""Examples in the form on which a model trains: token ids, packed rows, and their order."""
