"""Creates backups of a home folder that is in use, and restores them."""
