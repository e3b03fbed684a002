"""Lists the routes of vLLM, and those that the server exposes."""

# All routes in the source of vLLM 0.32 (vllm/entrypoints), whatever the model, the flags and the development mode that
# open them; `*` is any path below. A row is a method and a path.
VLLM_ROUTES = """
POST /abort_requests
POST /classify
POST /cohere/v2/chat
POST /cohere/v2/chat/render
POST /collective_rpc
POST /detokenize
GET /docs
GET /docs/oauth2-redirect
GET /redoc
GET /openapi.json
POST /fault_tolerance/apply
GET /fault_tolerance/status
POST /finish_weight_update
POST /generative_scoring
GET /get_world_size
GET /health
POST /inference/v1/abort_requests
POST /inference/v1/generate
POST /init_weight_transfer_engine
POST /invocations
GET /is_paused
POST /is_scaling_elastic_ep
GET /is_sleeping
GET /kv_event_sources
GET /load
GET /metrics
POST /pause
GET /ping
POST /ping
POST /pooling
GET /ready
GET /readyz
POST /release_kv_cache_memory
POST /rerank
POST /reset_encoder_cache
POST /reset_mm_cache
POST /reset_prefix_cache
POST /resume
POST /scale_elastic_ep
POST /score
GET /server_info
POST /shutdown_weight_transfer_engine
POST /sleep
POST /start_draft_weight_update
POST /start_profile
POST /start_weight_update
GET /static/swagger-ui.css
POST /stop_profile
POST /tokenize
GET /tokenizer_info
POST /update_weight_version
POST /update_weights
POST /v1/audio/transcriptions
POST /v1/audio/translations
POST /v1/chat/completions
POST /v1/chat/completions/batch
POST /v1/chat/completions/derender
POST /v1/chat/completions/render
POST /v1/completions
POST /v1/completions/derender
POST /v1/completions/render
POST /v1/embeddings
POST /v1/load_lora_adapter
POST /v1/messages
POST /v1/messages/count_tokens
POST /v1/messages/render
GET /v1/models
GET /v1/realtime
POST /v1/rerank
POST /v1/responses
POST /v1/responses/render
GET /v1/responses/resp_1
POST /v1/responses/resp_1/cancel
POST /v1/score
POST /v1/systemone
POST /v1/unload_lora_adapter
POST /v2/embed
POST /v2/rerank
GET /version
POST /wake_up
POST /weight_checker
GET /weight_info
"""


OURS = {
    "GET /health",
    "GET /metrics",
    "GET /openapi.json",
    "GET /v1/models",
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /tokenize",
    "POST /v1/messages",
    "POST /v1/messages/count_tokens",
    "POST /v1/responses",
}


CLOSED = sorted(set(VLLM_ROUTES.split("\n")) - OURS - {""})
