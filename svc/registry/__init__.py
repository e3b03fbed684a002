"""Model versions: their content, their folders, and the resolution of names. The only owner of their paths."""
