"""API keys: their scopes, limits and usage.

A server has one `Authenticator` for its store and runs its `follow` method as a background task. Each request calls
`grant(secret)`, which only reads from memory. When a grant ends, its `ended` event stops the running requests; see
`serving.http.authentication`. Admission uses `principal.limits` and `principal.weight`. Once a request has ended,
`UsageMeter.add` counts it. A thread calls `UsageMeter.flush` every few seconds and at shutdown.
"""
