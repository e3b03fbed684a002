"""From trained weights to what is served: merged, and quantized with GPTQ."""
