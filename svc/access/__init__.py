"""Keys: who may use the service, for what, and how much of it was used.

A server holds one `Authenticator` over its store and runs its `follow` beside everything else. For each request it asks
`grant(secret)`, which touches memory alone, and for what goes on with a grant `check(grant)` after each look: see
serving.http.authentication. `principal.limits` and `principal.weight` are for admission. When a request has ended,
`UsageMeter.add` counts it; a thread calls `UsageMeter.flush` every few seconds and at the end.
"""
