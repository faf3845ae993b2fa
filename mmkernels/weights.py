"""Checkpoints in and out: `mmkernels.weights.load`, `save`, `convert`."""

from mmkernels.models.weights import convert as convert
from mmkernels.models.weights import load as load
from mmkernels.models.weights import save as save
