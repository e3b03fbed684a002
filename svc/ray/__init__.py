"""What training and engines share about a Ray cluster: its address, resources and orphaned processes."""
