"""`svc monitor`: metrics of the server, versions, training and drift on one page."""
