"""Decides from the traffic of a canary whether the candidate is worse than production, at any time and with one error
budget.

    request ─▶ units ─▶ blocks ─▶ betting ─▶ analysis
               one observation    candidate minus    evidence for and      verdict of
               per user           production, in     against a loss        each signal
                                  one period         beyond the margin

Pure: no clock, no store. The same requests in the same order give the same verdicts, so a server that restarts rebuilds
the analysis from its request log.
"""
