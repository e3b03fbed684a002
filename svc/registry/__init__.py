"""Model versions: their content, folders and name resolution. Only this package handles their paths."""
