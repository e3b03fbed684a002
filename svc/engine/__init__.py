"""One vLLM process: how it is started, asked, reloaded in place, proven and stopped. vLLM is never imported here."""
