"""The plots in a report, by subject."""
