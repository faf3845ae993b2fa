"""Routing: rows into groups, on the device."""

from mmkernels.primitives.routing.op import Groups as Groups
from mmkernels.primitives.routing.op import route_groups as route_groups
