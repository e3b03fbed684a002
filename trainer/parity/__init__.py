"""The parity report: checks that the served model is the trained model."""
