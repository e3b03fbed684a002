"""Put versions into production, and keep them there.

The story from top to bottom: `reconciler` waits for a requested rollout or a new desired version; `rollout` tries a
candidate; `swap` puts the desired version into all engines; `engine_change` changes one engine.
"""
