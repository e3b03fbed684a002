"""Chat examples: turns, tool calls, and the canonical form of a prompt."""
