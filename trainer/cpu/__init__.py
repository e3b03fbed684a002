"""Code that makes training on a CPU fast enough. Imports torch."""
