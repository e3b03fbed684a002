"""API keys: their scopes, limits and usage.

A server has one `Authenticator` for its store and runs its `follow` method as a background task. Each request calls
`grant(secret)`, which only reads from memory. When the secret is no longer valid, the `ended` event of the returned
grant stops the requests that are running with that secret; see `serving.gateway.authentication`. Admission uses
`principal.limits` and `principal.weight`. Once a request has ended, `UsageMeter.add` counts it. A thread calls
`UsageMeter.flush` every few seconds and at shutdown.
"""
