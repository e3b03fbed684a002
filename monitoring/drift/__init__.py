"""Whether live traffic still looks like the examples that a version was made from."""
