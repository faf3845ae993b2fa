"""The arithmetic that the CUDA router shares with the CPU's, compiled for the host and walked tile by tile as the GPU does."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from mmkernels import moe_route, using

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")

_SOURCE = """
#include <vector>
#include "moe/route.h"
using namespace mmkernels;
extern "C" void place(const int32_t* experts, const bool* mask, int64_t T, int64_t E, int64_t K, int64_t capacity,
                      bool choices, int how, float* weights, int32_t* order, int32_t* inverse, int32_t* counts) {
  const int64_t tiles = (T + kTile - 1) / kTile, slabs = (choices ? K : 1) * tiles;
  std::vector<int32_t> found(slabs * E), ids(T * K), start(E);
  for (int64_t i = 0; i < T * K; ++i) ids[i] = mask[i / K] ? experts[i] : -1;
  for (int64_t i = 0; i < T * K; ++i) {
    const int64_t tile = i / K / kTile;
    if (ids[i] >= 0) ++found[slab_of(tile, i - tile * kTile * K, tiles, K, choices) * E + ids[i]];
  }
  int32_t at = 0;
  for (int64_t e = 0; e < E; ++e) {
    counts[e] = kept_of(scan_slabs(found.data(), slabs, E, e), capacity);
    start[e] = at, at += counts[e];
  }
  for (int64_t i = 0; i < T * K; ++i) order[i] = -1;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = tile * kTile * K, size = (T * K - first < kTile * K ? T * K - first : kTile * K);
    for (int64_t i = 0; i < size; ++i) {
      const int32_t e = ids[first + i];
      inverse[first + i] = -1;
      if (e < 0) continue;
      const int64_t slab = slab_of(tile, i, tiles, K, choices);
      const int32_t slot = found[slab * E + e] + rank_in_tile(ids.data() + first, i, K, choices);
      if (slot < counts[e]) inverse[first + i] = start[e] + slot, order[start[e] + slot] = first + i;
    }
  }
  for (int64_t t = 0; t < T; ++t) normalize(Normalize(how), inverse + t * K, K, weights + t * K);
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("route")
    (folder / "place.cpp").write_text(_SOURCE)
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, "-o", folder / "place.so", folder / "place.cpp"], check=True)  # type: ignore[list-item]
    return ctypes.CDLL(str(folder / "place.so"))


_HOW = {"": 0, "before": 1, "after": 2}


@pytest.mark.parametrize(("policy", "k", "how"), [
    ("dropless", 3, "before"), ("deepspeed_top2", 2, "after"), ("topk_capacity", 2, ""), ("deepspeed_position", 4, "after"),
])  # fmt: skip
@pytest.mark.parametrize("tokens", [1, 64, 65, 300])
def test_tiles_place_routes_as_the_law_does(library: Any, policy: str, k: int, how: str, tokens: int) -> None:
    logits = torch.randn(tokens, 6, generator=torch.Generator().manual_seed(tokens))
    mask = torch.arange(tokens) % 7 != 3
    for capacity in (None,) if policy == "dropless" else (None, 0, tokens // 4):
        with using("reference"):
            law = moe_route(logits, k, policy=policy, capacity=capacity, mask=mask)
            raw = moe_route(logits, k, mask=torch.ones_like(mask), renormalize=False)
        weights = raw.weights.clone()
        order, inverse, counts = (torch.full_like(x, 77) for x in (law.order, law.inverse, law.counts))
        rule = "" if policy == "topk_capacity" else how
        with using("reference"):
            law = moe_route(logits, k, policy=policy, capacity=capacity, mask=mask, renormalize=rule or False)
        tensors = [ctypes.c_void_p(x.data_ptr()) for x in (weights, order, inverse, counts)]
        places = ctypes.c_int64(-1 if capacity is None else capacity)
        sizes = (ctypes.c_int64(tokens), ctypes.c_int64(6), ctypes.c_int64(k), places)
        library.place(
            ctypes.c_void_p(raw.experts.data_ptr()), ctypes.c_void_p(mask.data_ptr()), *sizes,
            ctypes.c_bool(policy == "deepspeed_top2"), ctypes.c_int(_HOW[rule]), *tensors,
        )  # fmt: skip
        assert torch.equal(order, law.order) and torch.equal(inverse, law.inverse)
        assert torch.equal(counts, law.counts)
        torch.testing.assert_close(weights, law.weights)
