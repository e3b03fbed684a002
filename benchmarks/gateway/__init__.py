"""What a request costs on its way through a gateway: ours, beside LiteLLM, vllm-router and nginx."""
