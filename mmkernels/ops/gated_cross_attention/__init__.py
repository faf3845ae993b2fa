"""Family 1: media-masked gated cross-attention (Flamingo, OpenFlamingo, Otter, Idefics)."""

from mmkernels.ops.gated_cross_attention import rows as _rows  # noqa: F401  # registers the kernels
from mmkernels.ops.gated_cross_attention.feed_forward import gated_feed_forward as gated_feed_forward
from mmkernels.ops.gated_cross_attention.media import Intervals as Intervals
from mmkernels.ops.gated_cross_attention.media import media_intervals as media_intervals
from mmkernels.ops.gated_cross_attention.op import gated_cross_attention as gated_cross_attention
