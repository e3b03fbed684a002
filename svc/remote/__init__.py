"""How a server listens, and how a command on this machine or another one reaches it."""
