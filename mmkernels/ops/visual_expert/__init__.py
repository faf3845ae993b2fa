"""Family 3: visual experts (CogVLM, CogVLM2)."""

from mmkernels.ops.visual_expert import composed as _composed  # noqa: F401  # registers the kernels
from mmkernels.ops.visual_expert import triton as _triton  # noqa: F401
from mmkernels.ops.visual_expert.masks import causal_runs as causal_runs
from mmkernels.ops.visual_expert.masks import expert_mask as expert_mask
from mmkernels.ops.visual_expert.masks import image_positions as image_positions
from mmkernels.ops.visual_expert.op import expert_mlp as expert_mlp
from mmkernels.ops.visual_expert.op import expert_qkv as expert_qkv
from mmkernels.ops.visual_expert.op import modality_linear as modality_linear
