"""Asks a Ray cluster's autoscaler for machines, from a process that is connected to the cluster.

Ray's interface for this, `ray.autoscaler.sdk.request_resources`, is not used: it sets a single request for the whole
cluster, which would replace another program's request. A pending placement group is a separate request, which ends with
this process.
"""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from svc.ray.need import Need

_POLL_S = 1.0


def adds_machines() -> bool:
    """Return whether the cluster adds machines on demand.

    Every cluster has an autoscaler, even if all machines are started by hand. In the autoscaler's report, the type of a
    machine started by hand is named after the machine's id. Any other type is one that the autoscaler can start.
    """
    import ray

    started_by_hand = {f"node_{node['NodeID']}" for node in ray.nodes()}
    return not started_by_hand.issuperset(_machine_types())


def _machine_types() -> set[str]:
    """Return the types of the cluster's machines, as reported by the autoscaler. Machines that are starting are
    included only with version 1 of the autoscaler.
    """
    import ray
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    if is_autoscaler_v2():
        seen = get_cluster_status(ray.get_runtime_context().gcs_address)
        return {node.ray_node_type_name for node in [*seen.active_nodes, *seen.idle_nodes]}
    status = internal_kv_get_gcs_client().internal_kv_get(DEBUG_AUTOSCALING_STATUS.encode())  # as in `ray status`
    report = json.loads(status or "{}").get("autoscaler_report") or {}
    running = (report.get("node_type_mapping") or {}).values()  # `active_nodes` lacks a head that runs alone
    return {*running, *report.get("active_nodes", ()), *report.get("pending_launches", ())}


@contextmanager
def requested(needs: Sequence[Need], wait_s: float) -> Iterator[bool]:
    """Request machines for engines, and yield whether enough resources became available within a time limit.

    The resources are reserved for the duration of the `with` block.

    Args:
        wait_s: time limit in seconds. The wait ends early if the autoscaler reports that it cannot add such machines.
    """
    import ray
    from ray.util import placement_group, remove_placement_group

    group = placement_group([need.resources for need in needs])
    try:
        deadline, ready = time.monotonic() + wait_s, group.ready()
        while not (has_room := bool(ray.wait([ready], timeout=_POLL_S)[0])):
            if time.monotonic() >= deadline or _is_infeasible(group.id.hex()):
                break
        yield has_room
    finally:
        remove_placement_group(group)


def _is_infeasible(group: str) -> bool:
    """Return whether the autoscaler reports that it cannot add machines for a placement group. Only version 2 of the
    autoscaler reports this.
    """
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    reply = GetClusterStatusReply()
    reply.ParseFromString(internal_kv_get_gcs_client().get_cluster_status())
    infeasible = reply.autoscaling_state.infeasible_gang_resource_requests
    return any(group in request.details for request in infeasible)
