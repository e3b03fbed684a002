"""`svc compare`, which sends the same examples to two models and compares their answers."""
