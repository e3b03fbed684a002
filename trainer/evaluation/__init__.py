"""Evaluation of trained versions: parity with the engine, comparison, diagnosis and qualification."""
