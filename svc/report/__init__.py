"""The report of a version: everything that is known of it on one page."""
