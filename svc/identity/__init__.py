"""Who does something: keys with their scopes and limits, their secrets, and whoever the audit log names."""
