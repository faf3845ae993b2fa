"""The two normalisations of these models, by name."""

from __future__ import annotations

from torch import nn

from mmkernels.primitives import _check

EPS = {"layer": 1e-5, "rms": 1e-6}


def make_norm(
    kind: str, width: int, *, eps: float | None = None, bias: bool = True
) -> nn.LayerNorm | nn.RMSNorm:
    """`"layer"` (with bias unless told) or `"rms"`; eps defaults to what the published models of that kind use."""
    _check.choice("norm", kind, EPS)
    eps = EPS[kind] if eps is None else eps
    return nn.LayerNorm(width, eps, bias=bias) if kind == "layer" else nn.RMSNorm(width, eps)
