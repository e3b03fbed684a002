"""Texts and shapes of the models that are converted to GGUF."""

TEXTS = (
    "  two  spaces\n\n\nlines\t\ttabs 12345 3.14 don't DON'T we'll  ",
    "na\u00efve caf\u00e9 \u2014 \u65e5\u672c\u8a9e \U0001f937 1,234",
    "if x:\r\n    return 1\r\n\r\n",
)
GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 16, "num_hidden_layers": 4}
"""Shape of a tiny Gemma 2."""
