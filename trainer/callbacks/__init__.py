"""What watches a run, step by step. Imports transformers."""
