"""One vLLM process: how it is started, asked, reloaded in place, verified and stopped. vLLM is never imported here."""
