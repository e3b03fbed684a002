"""Benchmarks the cost per request of our gateway against LiteLLM, vllm-router and nginx."""
