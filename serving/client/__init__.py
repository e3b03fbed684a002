"""What `svc promote`, `svc rollback` and `svc chat` do: the client's side of a running server."""
