"""The client side of a promotion: changes the desired version, then follows the swap on the server.

On the server's machine, the client uses the store in tuneserve's home folder; on other machines, it uses the server's
API (serving.rollout.remote_client). Either way, the client changes the same desired state and reads the same journal.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from serving.rollout.promotion import VersionChange
from serving.rollout.remote_client import RemoteAdministration, swap_result
from svc.errors import BusyError, NotFoundError, ServerNotRunningError
from svc.remote.server_url import ServerAddress, read_status
from svc.store.rollouts import RolloutView
from svc.store.swaps import ServerSwap, SwapOutcome, SwapResult
from svc.version import Format, Target, VersionId

_POLL_S = 0.1
_ROLLOUT_POLL_S = 0.5
_SOON_S = 5.0
"""For this many seconds, a rollout is polled every `_POLL_S` seconds, so that the end of a quick rollback is noticed at
once. After that, the rollout is polled every `_ROLLOUT_POLL_S` seconds."""
_UNWRITTEN_S = 30.0
"""Maximum time to wait for the server to write a result to the journal, in seconds."""


@dataclass(frozen=True, slots=True)
class ServerResult:
    """Result of a change on one server.

    Attributes:
        address: host name and port of the server; empty if no other server can use the store.
        result: result of the swap on this server, or None if the server stopped before the swap ended.
    """

    address: str
    result: SwapResult | None


@dataclass(frozen=True, slots=True)
class FollowedChange:
    """Results of a change on all servers. On at least one of them, the swap ended."""

    servers: tuple[ServerResult, ...]

    @property
    def result(self) -> SwapResult:
        """Result of the first failed swap or, if no swap failed, of the first successful one.

        Servers that stopped before their swap ended are ignored. A failure on one server also cancels the swaps on the
        other servers, so the result of a cancelled swap is returned only if no swap failed in another way.
        """
        results = [server.result for server in self.servers if server.result]
        return min(results, key=lambda result: _ORDER.get(result.outcome, 0))


_ORDER = {SwapOutcome.CANCELLED: 1, SwapOutcome.SUCCEEDED: 2}


def follow(
    administration: RemoteAdministration, change: VersionChange, on_step: Callable[[str], None]
) -> FollowedChange:
    """Wait until every running server that serves the model has applied a change, and return the results.

    If a server cannot write the result to its journal, the result is eventually read from the server's status. If one
    of several servers stops, its result is no longer awaited.

    Args:
        change: the change to follow; its `generation` must not be None.
        on_step: called with the text of each step, once per step.

    Raises:
        BusyError: another change was made before any server began this change.
        ServerNotRunningError: the server stopped in the meantime. The server will apply the change the next
            time it starts.
    """
    name, generation = change.target.version.name, change.generation
    assert generation is not None  # noqa: S101 - callers follow only what changed the desired state
    known, shown, unwritten = dict[str, ServerSwap](), Counter[str](), dict[str, SwapResult]()
    next_check = time.monotonic() + _UNWRITTEN_S
    while True:
        known = _updated(known, administration.swaps(name, generation))
        for each in known.values():
            steps = each.swap.steps if each.swap else ()
            for step in steps[shown[each.server] :]:
                on_step(f"{each.address}: {step}" if len(known) > 1 else step)
            shown[each.server] = len(steps)
        pending = {each.server for each in known.values() if each.running and not _result_of(each)}
        if known and not pending:
            return _ended(known, change, {})
        if len(known) <= 1:
            try:
                administration.require_server()
            except ServerNotRunningError as error:
                raise _stopped(change) from error
        if time.monotonic() >= next_check:
            if pending and pending <= unwritten.keys():
                on_step("the server could not write the result to its journal; see the server's log")
                return _ended(known, change, unwritten)
            unwritten = _results_from_status(administration.server, change)
            next_check = time.monotonic() + _UNWRITTEN_S
        time.sleep(_POLL_S)


def follow_rollout(
    administration: RemoteAdministration, name: str, rollout: int, on_step: Callable[[str], None]
) -> RolloutView:
    """Wait until a rollout has ended, and return its final state.

    Args:
        on_step: called with the text of each step, once per step.

    Raises:
        ServerNotRunningError: the server stopped in the meantime. It will continue the rollout the next
            time it starts.
    """
    shown, soon = 0, time.monotonic() + _SOON_S
    while True:
        seen = next((view for view in administration.rollouts(name) if view.id == rollout), None)
        if seen is None:
            raise NotFoundError(f"model {name!r} has no rollout {rollout}")
        for step in seen.steps[shown:]:
            on_step(step)
        shown = len(seen.steps)
        if seen.outcome is not None:
            return seen
        try:
            administration.require_server()
        except ServerNotRunningError as error:
            raise ServerNotRunningError(
                f"the server stopped during the rollout of {seen.version}",
                todo=f"start the server again; it continues the rollout: svc serve {name}",
            ) from error
        time.sleep(_POLL_S if time.monotonic() < soon else _ROLLOUT_POLL_S)


def read_served(server: ServerAddress) -> dict[str, Target]:
    """Return the version and format that a server currently serves for each model, keyed by model name.

    The served version may not be the desired version yet.

    Raises:
        ServerNotRunningError: the server is not responding.
    """
    return {
        model["model"]: Target(VersionId.parse(model["version"]), Format(model["format"]))
        for model in read_status(server)["models"]
    }


def _updated(known: Mapping[str, ServerSwap], swaps: Sequence[ServerSwap]) -> dict[str, ServerSwap]:
    """Return the latest known state of each server, keyed by server id.

    Earlier values are kept for stopped servers: the store has no address for a stopped server, and no entry at all if
    the server had not begun a swap.
    """
    stopped = {server: replace(each, running=False) for server, each in known.items()}
    return stopped | {
        each.server: replace(each, address=known[each.server].address) if each.server in known else each
        for each in swaps
    }


def _result_of(each: ServerSwap) -> SwapResult | None:
    """Return a server's result, or None if the server may still produce one."""
    if each.swap:
        return each.swap.result
    return SwapResult(SwapOutcome.CANCELLED, f"superseded by {each.later}") if each.later else None


def _ended(
    known: Mapping[str, ServerSwap], change: VersionChange, unwritten: Mapping[str, SwapResult]
) -> FollowedChange:
    """Return the results of all servers.

    Args:
        unwritten: results that are not in the journal, keyed by server id.

    Raises:
        BusyError: another change was made before any server began this change.
        ServerNotRunningError: all servers have stopped without a result.
    """
    if not any(each.swap for each in known.values()):
        for each in known.values():
            if each.later:
                raise BusyError(
                    f"{each.later} was promoted before the server began the promotion of {change.target}",
                    todo="see `svc status`, then try again",
                )
    results = [ServerResult(each.address, _result_of(each) or unwritten.get(server)) for server, each in known.items()]
    if not any(each.result for each in results):
        raise _stopped(change)
    return FollowedChange(tuple(results))


def _stopped(change: VersionChange) -> ServerNotRunningError:
    return ServerNotRunningError(
        f"the server stopped before {change.target} was served",
        todo=f"start the server again; it will serve {change.target}: svc serve {change.target.version.name}",
    )


def _results_from_status(server: ServerAddress, change: VersionChange) -> dict[str, SwapResult]:
    """Return the result of the swap from the server's status, keyed by the server's id. Return an empty dict if the
    status has no such result, or if the server is not running.
    """
    with suppress(ServerNotRunningError):
        status = read_status(server)
        for model in status["models"]:
            swap = model["last_swap"]
            if model["model"] == change.target.version.name and swap and swap["generation"] == change.generation:
                result = swap_result(swap)
                return {status["server"]: result} if result else {}
    return {}
