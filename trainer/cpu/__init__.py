"""What only a CPU needs to train at a bearable speed. Imported only inside functions: torch comes with it."""
