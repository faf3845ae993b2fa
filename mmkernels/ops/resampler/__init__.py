"""Family 2: few queries, long media (Perceiver, Q-Former, Qwen-VL, XComposer, LLaMA-VID)."""

from mmkernels.ops.resampler.op import latent_attention as latent_attention
from mmkernels.ops.resampler.qformer import QFormerIntervals as QFormerIntervals
from mmkernels.ops.resampler.qformer import qformer_intervals as qformer_intervals
