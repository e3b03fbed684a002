"""`svc monitor`: exports metrics of the server, versions, training and drift on one page."""
