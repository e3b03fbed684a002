"""Keys: who may use the service, for what, and how much of it was used.

A server that checks keys holds one `Authenticator` over its store and runs its `follow` beside everything else. For
each request it takes the secret out of `Authorization: Bearer ...` (or Anthropic's `x-api-key`), asks
`authenticate(secret)` for a `Principal`, which touches memory alone, and then `principal.require(Scope.INFER)` and
`principal.require_model(name)`. `AuthenticationError` is a 401, `PermissionDeniedError` a 403, `KeysUnavailableError` a
503. `principal.key_id` goes into `RequestRecord.key_id`, and into `keep_feedback(..., key_id=...)` unless the principal
is an admin; `principal.limits` and `principal.weight` are for admission. When a request has ended, `UsageMeter.add`
counts it; a thread calls `UsageMeter.flush` every few seconds and at the end.
"""
