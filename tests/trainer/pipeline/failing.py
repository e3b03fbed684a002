"""A stage that fails, in a module of its own that a child process imports fast."""

import numpy as np


def fail_in_numpy() -> None:
    """Fail in a library, like a stage."""
    np.linalg.inv(np.zeros((2, 2)))
