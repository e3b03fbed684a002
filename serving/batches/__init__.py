"""Batches of requests: the server answers a file of requests in the background, with spare capacity."""
