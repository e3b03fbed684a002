"""API keys: their scopes, limits and usage.

A server has one `Authenticator` on its store and runs the authenticator's `follow` as a background task.
Each request calls `grant(secret)`, which reads only memory. A grant's `ended` event stops running
requests; see serving.http.authentication. Admission uses `principal.limits` and `principal.weight`. Once
a request has ended, `UsageMeter.add` counts it. A thread calls `UsageMeter.flush` every few seconds and
at shutdown.
"""
