"""Training in several processes: on the GPUs of one machine, and on the machines of a Ray cluster."""
