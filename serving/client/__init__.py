"""The client side of a running server.

It is used by `svc promote`, `svc rollback`, `svc add`, `svc remove` and `svc chat`.
"""
