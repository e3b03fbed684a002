"""Identities: API keys with their scopes, limits and secrets, and the actors named in the audit log."""
