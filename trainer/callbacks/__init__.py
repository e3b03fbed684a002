"""What watches a run, step by step. Imported only inside functions: transformers comes with it."""
