"""Exports trained weights to a version's formats: merged, quantized (GPTQ, AWQ, INT8, FP8) and GGUF."""
