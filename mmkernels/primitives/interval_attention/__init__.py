"""Engine 1: attention in which every row sees one contiguous run of keys."""

from mmkernels.primitives.interval_attention import triton as _triton  # noqa: F401  # registers the kernels
from mmkernels.primitives.interval_attention.op import interval_attention as interval_attention
from mmkernels.primitives.interval_attention.op import merge_attention as merge_attention
