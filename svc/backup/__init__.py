"""Creates backups of a home that is in use, and restores them."""
