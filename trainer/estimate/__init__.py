"""Estimate of a recipe's memory, disk, time and cost before it runs, from the base's config, without weights."""
