"""The parity report, which checks that the served model is the trained model."""
