"""Cost of a request in a gateway: ours, compared with LiteLLM, vllm-router and nginx."""
