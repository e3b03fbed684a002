"""Exports trained weights to the served formats: merged, and quantized with GPTQ."""
