"""Names what is trained when a recipe adds tokens."""

TOKENS = ("<tool>", "</tool>")
EMBEDDING = "model.embed_tokens.weight"
