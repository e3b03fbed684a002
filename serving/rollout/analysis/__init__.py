"""Decides from a canary's traffic whether the candidate is worse than production.

Decisions can be made at any time, and share one error budget.

    request ─▶ units ─▶ blocks ─▶ betting ─▶ analysis
               one observation    candidate minus    evidence for and      verdict of
               per user           production, in     against a difference  each signal
                                  one period         beyond the margin

The code is pure: it uses neither a clock nor the store. The same requests in the same order give the same
verdicts, so a restarted server rebuilds the analysis from its request log.
"""
