"""`svc monitor`: the server's metrics, and those of versions, training and drift, on one page."""
