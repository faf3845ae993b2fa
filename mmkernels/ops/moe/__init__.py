"""Family 4: mixtures of experts (MoE-LLaVA, Mixtral)."""

from mmkernels.ops.moe.op import moe_ffn as moe_ffn
from mmkernels.ops.moe.route import Routing as Routing
from mmkernels.ops.moe.route import load_balancing_loss as load_balancing_loss
from mmkernels.ops.moe.route import moe_capacity as moe_capacity
from mmkernels.ops.moe.route import moe_route as moe_route
