"""Server addresses, and clients for servers on this machine or on another one."""
