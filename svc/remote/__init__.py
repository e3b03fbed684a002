"""Addresses of a server, and clients that reach it from this machine or another one."""
