"""Measures the quality of canary rollouts' decisions, by running simulated traffic through the real analysis and
through fixed thresholds.
"""
