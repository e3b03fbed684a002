"""Chat examples: turns, tool calls, and a canonical form of the prompt."""
