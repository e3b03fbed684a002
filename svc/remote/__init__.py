"""Server addresses, and clients that reach a server from this machine or another one."""
