"""Chat examples, their turns and tool calls, and the normalized form of prompts."""
