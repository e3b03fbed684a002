"""Predicts how many replicas a load needs, by simulating engines with measured or estimated step times (`svc plan`)."""
