"""Identities: keys with their scopes and limits, their secrets, and the actors named in the audit log."""
