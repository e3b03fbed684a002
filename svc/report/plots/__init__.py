"""The plots of a report, by subject."""
