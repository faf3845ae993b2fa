"""Images as packed slices of any size: patch embedding, attention, per-window LoRA, region pooling, splicing."""

from mmkernels.ops.sliced_image import composed as _composed  # noqa: F401  # registers the kernels
from mmkernels.ops.sliced_image import composed_regions as _composed_regions  # noqa: F401
from mmkernels.ops.sliced_image import composed_rows as _composed_rows  # noqa: F401
from mmkernels.ops.sliced_image import composed_splice as _composed_splice  # noqa: F401
from mmkernels.ops.sliced_image import triton as _triton  # noqa: F401
from mmkernels.ops.sliced_image.attention import slice_attention as slice_attention
from mmkernels.ops.sliced_image.lora import segment_lora as segment_lora
from mmkernels.ops.sliced_image.op import slice_patch_embed as slice_patch_embed
from mmkernels.ops.sliced_image.pooling import region_attention as region_attention
from mmkernels.ops.sliced_image.pooling import region_pool as region_pool
from mmkernels.ops.sliced_image.regions import pool_size as pool_size
from mmkernels.ops.sliced_image.slices import slice_offsets as slice_offsets
from mmkernels.ops.sliced_image.splice import splice_embeddings as splice_embeddings
