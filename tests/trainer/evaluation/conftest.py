"""Fixtures for a pipeline whose models answer general questions."""

from tests.trainer.pipeline.conftest import engines, make, pipeline, stages

__all__ = ["engines", "make", "pipeline", "stages"]
