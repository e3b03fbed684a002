"""Puts versions into production, and keeps them there.

From top to bottom: `reconciler` waits for a requested rollout or a new desired version; `rollout` tries a candidate;
`swap` puts the desired version into all engines; `engine_change` changes one engine.
"""
