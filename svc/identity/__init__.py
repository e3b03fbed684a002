"""Identities: keys with their scopes and limits, their secrets, and the actors that the audit log names."""
