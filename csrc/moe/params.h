// Arguments of this room's compiled kernels: plain data, shared by the bindings and the torch-free kernels.
// Letters: T tokens, E experts, K routes of a token.
#pragma once

#include "../common/dtype.h"

namespace mmkernels {

enum Drop : int { kByPosition, kByNoise, kByProbs };
enum Normalize : int { kRaw, kBefore, kAfter };
enum Balance : int { kFirstChoices, kAllChoices, kAllChoicesByK };

struct MoeRules {
  int64_t capacity;  // places of an expert, negative for no limit
  bool choices;      // all first choices get their slots before any second one
  bool whole;        // the auxiliary loss averages over masked tokens too
  Drop drop;
  Normalize normalize;
  Balance balance;
};

struct MoeRoute {
  const void* logits;  // [T, E], rows `stride` elements apart
  Dtype dtype;
  int64_t stride;
  const float* noise;  // [T, E] or null
  const bool* mask;    // [T] or null
  int64_t T, E, K;
  MoeRules rules;
  float* weights;            // [T, K]; chosen probabilities until routes are dropped
  int32_t* experts;          // [T, K]
  int32_t *order, *inverse;  // [T K]
  int32_t *counts, *chosen;  // [E]
  float *aux_loss, *z_loss;  // one number each
};

// What the GPU's router leaves between its phases; slabs: see route.h.
struct MoeWorkspace {
  int32_t* slabs;      // [tiles or K tiles, E]
  float* tile_share;   // [tiles, E]; then its first row is the sum
  float* tile_square;  // [tiles]
  int32_t* first;      // [E] first choices
  int64_t tiles;
};

constexpr int64_t kTile = 64;           // tokens
constexpr int64_t kMostExperts = 1024;  // of the GPU's router
constexpr int64_t kMostRoutes = 16;     // of a token

// What some tokens add to the losses: sums of p[t, e] and of the squares of their log-sum-exp.
struct MoePart {
  float* share;
  double square;
};

struct MoeRouteBackward {
  const void* logits;
  Dtype dtype;
  int64_t stride;
  const bool* mask;
  int64_t T, E, K;
  MoeRules rules;
  const int32_t *experts, *inverse;
  const float *dweights, *daux, *dz;
  void* dlogits;  // [T, E] of logits' dtype, contiguous
};

// out[t] = sum_j weights[t, j] y[inverse[t K + j]], j after j; rows outside [0, rows) add nothing.
struct MoeCombine {
  const float* y;        // [rows, C]
  const float* weights;  // [T, K], or null for ones
  const int32_t* inverse;
  int64_t rows, T, K, C;
  void* out;  // [T, C]
  Dtype dtype;
};

// Both launch on `stream` and return the cudaError_t of the launch. `share` [E] and `tokens` [1] are
// workspace.
int moe_choose_cuda(const MoeRoute& p, const MoeWorkspace& w, void* stream);
int moe_choose_backward_cuda(const MoeRouteBackward& p, float* share, float* tokens, void* stream);

}  // namespace mmkernels
