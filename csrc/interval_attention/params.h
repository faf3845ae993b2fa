// Arguments of this room's CPU kernels: plain data, shared by the binding and the torch-free kernels.
// Letters: B batch, T query rows (Tq), J keys (Tk), H heads, G key heads, D head width.
#pragma once

#include "../common/dtype.h"

namespace mmkernels {

struct Tokens {  // [B, T or J, H or G, D], unit last stride; the other strides in elements
  void* p;
  int64_t b, t, h;
};

struct PerRow {  // [B, T] or [B, H, T]
  void* p;
  int64_t b, h, t;
};

struct IntervalAttention {
  Tokens q, k, v, out;
  PerRow lo, hi, uniform;  // int32, int32, bool (p is null: no row is uniform)
  PerRow lse;              // float [B, H, T]; forward writes it
  const float* slopes;     // [H], or null
  int64_t B, T, J, H, G, D;
  float scale, dropout_p;
  uint32_t seed, threshold;  // a key is dropped when its hash is below the threshold
  Dtype rows, keys;          // dtypes of q, out and their gradients, and of k, v and theirs
};

struct IntervalAttentionBackward : IntervalAttention {
  Tokens dout, dq, dk, dv;
  PerRow dlse;  // float, or null
};

// Rows of a task: those of one key head, t-major with the heads of its group inside, cut into equal blocks.
constexpr int kBlockRows = 252;
constexpr int kTileKeys = 64;

// Backward tasks own a key head, and where these are few, one of a fixed number of equal shares of its query
// blocks: a number that depends on shapes only, so that results do not depend on the number of threads.
constexpr int kWantedTasks = 8;

static inline int64_t rows_of(const IntervalAttention& p) { return p.T * (p.H / p.G); }
static inline int64_t blocks_of(const IntervalAttention& p) {
  return (rows_of(p) + kBlockRows - 1) / kBlockRows;
}
static inline int64_t shares_of(const IntervalAttention& p) {
  const int64_t wanted = (kWantedTasks + p.B * p.G - 1) / (p.B * p.G), blocks = blocks_of(p);
  return wanted < blocks ? wanted : blocks;
}
static inline int64_t tiles_of(const IntervalAttention& p) { return (p.J + kTileKeys - 1) / kTileKeys; }
static inline int64_t padded_width(const IntervalAttention& p) { return (p.D + 15) / 16 * 16; }

}  // namespace mmkernels
