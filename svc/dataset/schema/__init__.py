"""A chat example: its turns, its tool calls, and its prompt in a form in which equal ones are equal."""
