"""Runs examples through an endpoint and says how good the answers are. What is measured is what is served."""
