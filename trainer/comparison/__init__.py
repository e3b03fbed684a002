"""`svc compare`, which has two models answer the same examples and compares their answers."""
