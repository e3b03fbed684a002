"""Starts and stops vLLM, sends requests to it, and reloads and verifies its weights. vLLM is never imported here."""
