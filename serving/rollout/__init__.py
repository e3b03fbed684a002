"""Puts versions into production, and keeps them there.

From top to bottom: `reconciler` waits for a requested rollout or a new desired version; `rollout` tries a candidate;
`swap` loads the desired version in all engines; `engine_change` changes one engine.
"""
