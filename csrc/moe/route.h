// What the CPU's and the GPU's router share: numbers made finite, the renormalisation and its gradient, the
// arithmetic of places. Torch-free; internal linkage, so that no copy for one instruction set serves another.
#pragma once

#include "params.h"

#if defined(__CUDACC__)
#define MMK_SHARED static __host__ __device__ inline
#else
#define MMK_SHARED static inline
#endif

namespace mmkernels {

constexpr float kLargest = 3.402823466e38f;    // of float32
constexpr float kSmallest = 1.175494351e-38f;  // normal one
constexpr float kEpsilon = 1.1920929e-7f;      // of float32: the published floor of a renormalising sum

// NaN becomes the lowest number, infinities the largest and lowest.
MMK_SHARED float finite(float x) { return x > kLargest ? kLargest : x >= -kLargest ? x : -kLargest; }

MMK_SHARED float floor_of(Normalize how) { return how == kAfter ? kEpsilon : kSmallest; }

// What the chosen probabilities of a token are divided by.
MMK_SHARED float total_of(Normalize how, const float* chosen, const int32_t* inverse, int64_t K) {
  if (how == kRaw) return 1.f;
  float total = 0.f;
  for (int64_t j = 0; j < K; ++j)
    if (how == kBefore || inverse[j] >= 0) total += chosen[j];
  return total > floor_of(how) ? total : floor_of(how);
}

// Chosen probabilities become weights in place; a dropped route weighs 0.
MMK_SHARED void normalize(Normalize how, const int32_t* inverse, int64_t K, float* weights) {
  const float total = total_of(how, weights, inverse, K);
  for (int64_t j = 0; j < K; ++j) weights[j] = inverse[j] >= 0 ? weights[j] / total : 0.f;
}

// The gradient of the j-th chosen probability, through `weights = normalize(chosen)`.
MMK_SHARED float chosen_gradient(Normalize how, const float* chosen, const int32_t* inverse,
                                 const float* dweights, int64_t K, int64_t j) {
  const float total = total_of(how, chosen, inverse, K);
  float found = inverse[j] >= 0 ? dweights[j] / total : 0.f;
  if (how == kRaw || total <= floor_of(how) || (how == kAfter && inverse[j] < 0)) return found;
  float dot = 0.f;
  for (int64_t i = 0; i < K; ++i)
    if (inverse[i] >= 0) dot += dweights[i] * (chosen[i] / total);
  return found - dot / total;
}

// How many of an expert's routes find a place.
MMK_SHARED int32_t kept_of(int32_t routes, int64_t capacity) {
  return capacity >= 0 && routes > capacity ? static_cast<int32_t>(capacity) : routes;
}

// What the chosen routes of an expert weigh in the auxiliary loss, by its routes before any was dropped.
MMK_SHARED float share_of(const MoeRules& rules, int64_t E, int64_t K, int64_t routes, float tokens) {
  const float scale = rules.balance == kAllChoicesByK ? static_cast<float>(E) / K : static_cast<float>(E);
  return scale * static_cast<float>(routes) / tokens;
}

// A tile's routes are tile[t K + j], -1 where a token goes nowhere. How many routes of the same expert come
// before route i inside the tile: token by token, or (`choices`) among the choices of i's own rank.
MMK_SHARED int32_t rank_in_tile(const int32_t* tile, int64_t i, int64_t K, bool choices) {
  int32_t rank = 0;
  for (int64_t other = choices ? i % K : 0; other < i; other += choices ? K : 1)
    rank += tile[other] == tile[i];
  return rank;
}

// The slab that counts the route: one for each tile or, by choices, for each (rank of choice, tile).
MMK_SHARED int64_t slab_of(int64_t tile, int64_t i, int64_t tiles, int64_t K, bool choices) {
  return choices ? i % K * tiles + tile : tile;
}

// Counts of one expert, slab after slab, become the slot of each slab's first route; returns how many there
// are.
MMK_SHARED int32_t scan_slabs(int32_t* slabs, int64_t count, int64_t E, int64_t e) {
  int32_t running = 0;
  for (int64_t slab = 0; slab < count; ++slab) {
    const int32_t routes = slabs[slab * E + e];
    slabs[slab * E + e] = running;
    running += routes;
  }
  return running;
}

}  // namespace mmkernels
