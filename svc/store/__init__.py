"""The SQL store: desired states, and records of what happened."""
