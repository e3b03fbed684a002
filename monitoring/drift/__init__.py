"""Whether live traffic still looks like a version's held-out set."""
