"""What is measured and kept of requests: metrics, quantiles, the request log."""
