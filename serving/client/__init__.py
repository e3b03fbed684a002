"""The client side of a running server, for `svc promote`, `svc rollback`, `svc add`, `svc remove` and `svc chat`."""
