"""`svc compare`: two models answer the same examples, and their answers are compared."""
