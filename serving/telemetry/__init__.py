"""Request metrics, quantiles and traces, and the request log."""
