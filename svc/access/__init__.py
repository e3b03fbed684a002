"""API keys: their scopes, limits and usage.

A server has one `Authenticator` over its store and runs its `follow` as a background task. Each request calls
`grant(secret)`, which reads memory only; a grant's `ended` event stops running requests: see
serving.http.authentication. Admission uses `principal.limits` and `principal.weight`. After a request has ended,
`UsageMeter.add` counts it; a thread calls `UsageMeter.flush` every few seconds and at the end.
"""
