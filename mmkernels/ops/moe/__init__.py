"""Family 4: mixtures of experts (MoE-LLaVA, Mixtral)."""

from mmkernels.ops.moe import composed as _composed  # noqa: F401  # registers the kernels
from mmkernels.ops.moe import native as _native  # noqa: F401
from mmkernels.ops.moe import triton as _triton  # noqa: F401
from mmkernels.ops.moe.op import moe_ffn as moe_ffn
from mmkernels.ops.moe.route import Routing as Routing
from mmkernels.ops.moe.route import load_balancing_loss as load_balancing_loss
from mmkernels.ops.moe.route import moe_capacity as moe_capacity
from mmkernels.ops.moe.route import moe_route as moe_route
