"""Creates the parity report, which checks that the model to be served is the model that was trained."""
