"""Creates parity reports without a model."""

from svc.evaluation.intervals import Interval
from svc.registry.parity import Differences, ParityCheck, ParityReport, Speed
from svc.version import Format

_ONE = Interval(value=1.0, low=0.9, high=1.1)
SPEED = Speed(
    load_seconds=_ONE,
    first_token_seconds=_ONE,
    tokens_per_second={1: _ONE, 8: _ONE},
    memory_bytes=2**30,
    others_share=0.0,
)


def make_parity(*failed: str) -> ParityReport:
    """Return a report in which one check passed and the given checks failed."""
    checks = [ParityCheck(name="tokens", passed=True, found="2 of 2 equal", expected="the token ids of training")]
    checks += [ParityCheck(name=name, passed=False, found="<other>", expected="the base's") for name in failed]
    differences = Differences(nats=((0.01, -0.02), (0.0,)), agreement=2 / 3, diverges_at=(0, 1))
    return ParityReport(
        checks=tuple(checks), differences={"a & b": differences}, speed={Format.MERGED: SPEED}, examples=2, seconds=3.0
    )
