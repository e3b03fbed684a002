"""Commands that show the audit log and served versions, and delete logged requests."""
