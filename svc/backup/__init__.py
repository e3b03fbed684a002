"""Create backups of a home folder that is in use, and restore them."""
