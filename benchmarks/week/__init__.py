"""`make bench-week`: a simulated week of traffic, and the alerts that the real rules raise in it."""
