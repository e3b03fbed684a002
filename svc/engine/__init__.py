"""Controls a vLLM process: start, requests, in-place reload, verification and stop. vLLM is never imported here."""
