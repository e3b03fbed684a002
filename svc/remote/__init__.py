"""Server addresses, and clients for servers on this machine or other machines."""
