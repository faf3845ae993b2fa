"""Modules over the ops: what models are built from."""

from mmkernels.layers.attention import KVCache as KVCache
from mmkernels.layers.attention import rotary_table as rotary_table
from mmkernels.layers.context_attention import ContextAttention as ContextAttention
from mmkernels.layers.context_attention import content_tokens as content_tokens
from mmkernels.layers.decoder import Block as Block
from mmkernels.layers.decoder import BlockConfig as BlockConfig
from mmkernels.layers.decoder import Decoder as Decoder
from mmkernels.layers.decoder import DecoderConfig as DecoderConfig
from mmkernels.layers.gated_cross_attention import GatedCrossAttentionBlock as GatedCrossAttentionBlock
from mmkernels.layers.gated_cross_attention import project_media_all as project_media_all
from mmkernels.layers.mlp import MLP as MLP
from mmkernels.layers.positions import interpolate_positions as interpolate_positions
from mmkernels.layers.positions import sincos_positions as sincos_positions
from mmkernels.layers.projector import Projector as Projector
from mmkernels.layers.qformer import QFormer as QFormer
from mmkernels.layers.qformer_layer import QFormerConfig as QFormerConfig
from mmkernels.layers.qwen_resampler import QwenResampler as QwenResampler
from mmkernels.layers.resampler import PerceiverResampler as PerceiverResampler
from mmkernels.layers.t5 import T5 as T5
from mmkernels.layers.t5 import T5Cache as T5Cache
from mmkernels.layers.t5 import T5Config as T5Config
from mmkernels.layers.vision import VisionConfig as VisionConfig
from mmkernels.layers.vision import VisionTower as VisionTower
