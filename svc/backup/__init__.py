"""Create backups of a home directory that is in use, and restore them."""
