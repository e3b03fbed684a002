"""`make bench-week`: simulates a week of traffic and reports the alerts that the real rules raise."""
