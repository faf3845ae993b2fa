"""Engine 2: rows that choose their weights."""

from mmkernels.primitives.grouped_linear import cpu as _cpu  # noqa: F401  # registers the kernels
from mmkernels.primitives.grouped_linear import triton as _triton  # noqa: F401
from mmkernels.primitives.grouped_linear.op import grouped_linear as grouped_linear
