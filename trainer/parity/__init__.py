"""The parity report: what was trained is what is served."""
