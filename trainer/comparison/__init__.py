"""`svc compare`, which lets two models answer the same examples and compares their answers."""
