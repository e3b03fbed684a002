"""Model folders in the format of the hub."""
