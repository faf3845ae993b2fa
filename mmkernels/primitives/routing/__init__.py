"""Routing: rows into groups, on the device."""

from mmkernels.primitives.routing import triton as _triton  # noqa: F401  # registers the kernels
from mmkernels.primitives.routing.op import Groups as Groups
from mmkernels.primitives.routing.op import route_groups as route_groups
