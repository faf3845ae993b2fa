"""The compositions each room is timed against, beside the `eager` that its cases bring."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.peers import grouped, moe, visual_expert
from benchmarks.peers.attention import CORES
from mmkernels.ops.gated_cross_attention.cases import block
from mmkernels.primitives._case import Peer, Room
from mmkernels.primitives.interval_attention.cases import over

PEERS: dict[str, dict[str, Peer]] = {
    "interval_attention": {name: over(core) for name, core in CORES.items()},
    "gated_cross_attention": {name: block(core) for name, core in CORES.items()},
    "grouped_linear": dict(grouped.PEERS),
    "visual_expert": dict(visual_expert.PEERS),
    "moe": dict(moe.PEERS),
}
FLOORS = grouped.FLOORS


def peers(room: Room) -> Mapping[str, Peer]:
    return {**room.peers, **PEERS.get(room.name, {})}
