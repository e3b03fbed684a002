"""How good are the decisions of canary rollouts? Simulated traffic through the real analysis, and fixed thresholds."""
