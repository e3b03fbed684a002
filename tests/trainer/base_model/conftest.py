"""Fixtures for a version that serves as a base."""

from tests.trainer.pipeline.conftest import engines, make, pipeline, stages

__all__ = ["engines", "make", "pipeline", "stages"]
