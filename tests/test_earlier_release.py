"""A home that the release before made opens as it is: versions, store, and an engine that still runs.

tests/data/home_0_1_0 was written by that release: two versions, the desired states that led to the second and back, one
swap that ended and one that was cut off, a request with feedback. Its database is kept as SQL.
"""

import json
import shutil
import sqlite3
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from sqlalchemy import Engine as Store

from svc.engine.orphans import RECORD_FILE, start_of
from svc.registry.registry import Registry
from svc.store.answered import answered_ids, read_answered, read_ratings
from svc.store.database import open_database
from svc.store.desired import read_desired
from svc.store.swaps import SwapKind, SwapOutcome, SwapResult, find_swap
from svc.version import Format, Target, VersionId
from tests.serving.versions import HELDOUT, NAME, RESULT, AliasBook, target
from tests.svc.engine.test_orphans import engine_in, orphan

EARLIER = Path(__file__).parent / "data" / "home_0_1_0"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A copy."""
    shutil.copytree(EARLIER, tmp_path / "home")
    with sqlite3.connect(tmp_path / "home" / "svc.db") as connection:
        connection.executescript((EARLIER / "svc.sql").read_text("utf-8"))
    connection.close()
    return tmp_path / "home"


@pytest.fixture
def store(home: Path) -> Store:
    return open_database(home)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("format", [Format.MERGED, Format.GPTQ])
def test_its_versions_are_whole(home: Path, number: int, format: Format) -> None:
    registry = Registry(home / "models", AliasBook())
    registry.verify(VersionId(NAME, number), format)
    assert registry.manifest(VersionId(NAME, number)).formats[format].probes


def test_what_a_version_answered_is_read(home: Path) -> None:
    registry = Registry(home / "models", AliasBook())
    answers = registry.results(VersionId(NAME, 1), Format.MERGED)
    assert answers == (RESULT,) * len(HELDOUT)


def test_its_desired_state_is_the_one_that_it_had(store: Store) -> None:
    desired = read_desired(store, NAME)
    assert desired is not None
    assert (desired.target, desired.previous, desired.generation) == (target(1), target(2), 3)


def test_a_swap_that_ended_keeps_its_figures_and_steps(store: Store) -> None:
    swap = find_swap(store, NAME, generation=2)
    assert swap is not None
    assert swap.result == SwapResult(SwapOutcome.SUCCEEDED, None, 1.5, 3, 7, SwapKind.INPLACE, 2.5)
    assert swap.steps == ("holding new requests, 3 running", "held requests for 1.50 s, 7 of them")


def test_a_swap_that_was_cut_off_is_still_open(store: Store) -> None:
    swap = find_swap(store, NAME)
    assert swap is not None
    assert (swap.target, swap.result) == (target(1), None)


def test_requests_and_feedback_are_there(store: Store) -> None:
    served = Target(VersionId(NAME, 2), Format.MERGED)
    [row] = read_answered(store, served, answered_ids(store, served, after=0, newest=10, with_content=False))
    assert row.tokens_out == 5
    assert [(rated.bad, rated.corrected) for rated in read_ratings(store, served, newest=10)] == [(False, True)]


@pytest.mark.slow
async def test_its_engine_is_adopted() -> None:
    with TemporaryDirectory(prefix="svc") as name:
        folder = Path(name)
        async with orphan(folder) as engine:
            boot, ticks = start_of(engine.pid)
            record = json.loads((EARLIER / "engine.json").read_text("utf-8"))
            record |= {"folder": str(folder.resolve()), "pid": engine.pid, "boot": boot, "ticks": ticks}
            (folder / RECORD_FILE).write_text(json.dumps(record))
            adopting = engine_in(folder)
            assert await adopting.orphan_holds() == "tuned@1 (merged)"
            await adopting.adopt()
            assert await adopting.client.healthy()
            assert adopting.plan is not None
            await adopting.stop()
