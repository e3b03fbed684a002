"""Version reports, which show all facts about a version on one page."""
