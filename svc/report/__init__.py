"""The report of a version: all facts about it on one page."""
