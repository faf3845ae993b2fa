"""mmkernels: fused kernels for multimodal language models, as torch ops and as a full-model stack."""

import importlib

from mmkernels import _native as _native
from mmkernels._version import __version__ as __version__
from mmkernels.ops.gated_cross_attention import Intervals as Intervals
from mmkernels.ops.gated_cross_attention import gated_cross_attention as gated_cross_attention
from mmkernels.ops.gated_cross_attention import gated_feed_forward as gated_feed_forward
from mmkernels.ops.gated_cross_attention import media_intervals as media_intervals
from mmkernels.ops.moe import Routing as Routing
from mmkernels.ops.moe import load_balancing_loss as load_balancing_loss
from mmkernels.ops.moe import moe_capacity as moe_capacity
from mmkernels.ops.moe import moe_ffn as moe_ffn
from mmkernels.ops.moe import moe_route as moe_route
from mmkernels.ops.resampler import QFormerIntervals as QFormerIntervals
from mmkernels.ops.resampler import latent_attention as latent_attention
from mmkernels.ops.resampler import qformer_intervals as qformer_intervals
from mmkernels.ops.sliced_image import region_attention as region_attention
from mmkernels.ops.sliced_image import region_pool as region_pool
from mmkernels.ops.sliced_image import segment_lora as segment_lora
from mmkernels.ops.sliced_image import slice_attention as slice_attention
from mmkernels.ops.sliced_image import slice_offsets as slice_offsets
from mmkernels.ops.sliced_image import slice_patch_embed as slice_patch_embed
from mmkernels.ops.sliced_image import splice_embeddings as splice_embeddings
from mmkernels.ops.visual_expert import expert_mask as expert_mask
from mmkernels.ops.visual_expert import expert_mlp as expert_mlp
from mmkernels.ops.visual_expert import expert_qkv as expert_qkv
from mmkernels.ops.visual_expert import image_positions as image_positions
from mmkernels.ops.visual_expert import modality_linear as modality_linear
from mmkernels.primitives._op import backends as backends
from mmkernels.primitives._op import explain as explain
from mmkernels.primitives._op import using as using
from mmkernels.primitives.grouped_linear import grouped_linear as grouped_linear
from mmkernels.primitives.interval_attention import interval_attention as interval_attention
from mmkernels.primitives.interval_attention import merge_attention as merge_attention
from mmkernels.primitives.routing import Groups as Groups
from mmkernels.primitives.routing import route_groups as route_groups


def __getattr__(name: str) -> object:
    """The upper floors load when first asked for, so that the ops alone stay light to import."""
    if name in ("layers", "models", "weights"):
        return importlib.import_module(f"mmkernels.{name}")
    raise AttributeError(f"module 'mmkernels' has no attribute {name!r}")
