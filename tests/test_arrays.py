"""Arrays of other libraries come in and go out by DLPack, without a copy."""

from __future__ import annotations

import numpy as np
import torch

import mmkernels


def test_numpy_arrays_pass_through_without_a_copy() -> None:
    generator = np.random.default_rng(0)
    q, k, v = (generator.standard_normal((n, 2, 64), dtype="float32") for n in (6, 20, 20))
    lo, hi = np.zeros(6, "int32"), np.full(6, 20, "int32")
    shared = torch.from_dlpack(q)
    q[0, 0, 0] = 3.0
    assert shared[0, 0, 0] == 3.0
    out = mmkernels.interval_attention(*map(torch.from_dlpack, (q, k, v, lo, hi)))
    assert isinstance(out, torch.Tensor)
    scores = np.einsum("thd,mhd->thm", q, k, dtype="float64") / 8
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(
        np.from_dlpack(out), np.einsum("thm,mhd->thd", weights, v), rtol=2e-5, atol=2e-6
    )
