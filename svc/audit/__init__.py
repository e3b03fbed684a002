"""Commands for the service's history: the audit log, served versions, and the deletion of logged requests."""
