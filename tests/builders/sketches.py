"""Builds the sketches by which texts are compared."""

from svc.dataset.checks.minhash import Sketcher, Sketches


def sketches(*texts: str) -> Sketches:
    """Return the sketches of texts."""
    sketcher = Sketcher()
    for one in texts:
        sketcher.add(one)
    return sketcher.finish()
