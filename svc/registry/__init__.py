"""Model versions: their contents, folders and name resolution. Only this package handles their paths."""
