"""The server process: its start-up, its command, its connections, and the assembly of all parts."""
