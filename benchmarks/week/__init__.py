"""`make bench-week`: a simulated week of traffic, and the alerts raised by the real rules."""
