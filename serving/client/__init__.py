"""The client side of administering a running server and chatting with it.

It is used by `svc promote`, `svc rollback`, `svc add`, `svc remove` and `svc chat`.
"""
