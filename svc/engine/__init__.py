"""One vLLM process: start, requests, reload in place, verification and stop. vLLM is never imported here."""
