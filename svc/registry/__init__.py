"""Model versions: what they are made of, where they lie, and which one a name means. The only owner of their paths."""
