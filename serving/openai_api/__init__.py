"""The OpenAI wire format as the gateway needs it: requests, events, errors. Knows nothing of engines or versions."""
