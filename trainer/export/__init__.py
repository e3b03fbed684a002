"""Exports trained weights to the formats that are served: merged, and quantized with GPTQ."""
