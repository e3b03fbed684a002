"""What only a CPU needs to train at a bearable speed. Imports torch."""
