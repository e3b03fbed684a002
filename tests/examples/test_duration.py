"""Tests that the demo's duration estimate follows from its measurements."""

from examples.duration import MachineSpeed
from svc.engine.device import NumberType


def minutes(speed: float, import_s: float) -> float:
    return MachineSpeed(NumberType.BFLOAT16, speed, import_s).demo_minutes


def test_machine_half_as_fast_takes_twice_as_long() -> None:
    assert minutes(1e11, 3.0) == 2 * minutes(2e11, 1.5)


def test_duration_estimate_accounts_for_matmul_speed_and_process_startup_time() -> None:
    assert minutes(1e11, 1.5) > minutes(2e11, 1.5)
    assert minutes(2e11, 3.0) > minutes(2e11, 1.5)
