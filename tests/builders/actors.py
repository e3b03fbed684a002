"""Actors that tests record in the audit log."""

from svc.identity.actor import Actor

ALICE = Actor("user:alice", "box")
ALICE_KEY = Actor("key:alice", "10.0.0.1")
ANN = Actor("user:ann", "laptop")
