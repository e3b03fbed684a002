"""The `svc monitor` exporter, which serves metrics of the server, versions, training and drift on one page."""
