// What the forward and the backward kernel share: a block of query rows with their intervals, tiles of keys,
// and dropout. Torch-free; compiled once per instruction set.
#pragma once

#include "../common/gemm.h"
#include "../common/rows.h"
#include "params.h"

namespace mmkernels {
namespace MMKERNELS_ISA {

MMK_INLINE int64_t at(const PerRow& r, int64_t b, int64_t h, int64_t t) {
  return b * r.b + h * r.h + t * r.t;
}
MMK_INLINE void* row_of(const Tokens& x, Dtype d, int64_t b, int64_t t, int64_t h) {
  return element(x.p, d, b * x.b + t * x.t + h * x.h);
}

// A 32-bit hash: every bit of x reaches every bit of the result.
template <class U>
MMK_INLINE U mix(U x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// The rows [first, first + rows) of key head g in batch row b. Row r is query token t, head h of g's group.
struct Block {
  int64_t b, g, first, rows;
  int32_t lo[kBlockRows], hi[kBlockRows];
  int32_t t[kBlockRows], h[kBlockRows];
  bool uniform[kBlockRows];
  bool loaded[kBlockRows];  // rows are loaded when their first tile comes and stored after their last one, so
                            // that memory works while registers do
  uint64_t seen[kBlockRows];  // of the tile at hand: bit j is set when the row sees key j of the tile
  int32_t least, most;        // the hull of the intervals that are not empty
  bool ascends;               // neither lo nor hi ever falls: those who see a tile lie between two rows
  int64_t begin, end;         // those two: no other row sees a key of the tile at hand

  bool empty(int64_t r) const { return hi[r] == lo[r]; }
  bool learns(int64_t r) const { return !empty(r) && !uniform[r]; }
};

static void open_block(const IntervalAttention& p, int64_t b, int64_t g, int64_t index, Block& block) {
  const int64_t total = rows_of(p), count = blocks_of(p), size = (total + count - 1) / count, n = p.H / p.G;
  block.b = b;
  block.g = g;
  block.first = index * size;
  block.rows = block.first + size < total ? size : total - block.first;
  block.least = static_cast<int32_t>(p.J);
  block.most = 0;
  block.ascends = true;
  block.begin = 0;
  block.end = block.rows;
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t t = (block.first + r) / n;
    const int64_t lo = static_cast<const int32_t*>(p.lo.p)[at(p.lo, b, 0, t)];
    const int64_t hi = static_cast<const int32_t*>(p.hi.p)[at(p.hi, b, 0, t)];
    block.lo[r] = static_cast<int32_t>(lo < 0 ? 0 : lo > p.J ? p.J : lo);  // untrusted: clamped
    block.hi[r] = static_cast<int32_t>(hi < block.lo[r] ? block.lo[r] : hi > p.J ? p.J : hi);
    block.t[r] = static_cast<int32_t>(t);
    block.h[r] = static_cast<int32_t>(g * n + (block.first + r) % n);
    block.uniform[r] = p.uniform.p && static_cast<const bool*>(p.uniform.p)[at(p.uniform, b, 0, t)];
    block.loaded[r] = false;
    if (r > 0 && (block.lo[r] < block.lo[r - 1] || block.hi[r] < block.hi[r - 1])) block.ascends = false;
    if (block.empty(r)) continue;
    if (block.lo[r] < block.least) block.least = block.lo[r];
    if (block.hi[r] > block.most) block.most = block.hi[r];
  }
}

// Sets `seen` for the keys [key, key + 64) and returns the union: no key outside of it may be touched. A
// block's tiles come in ascending order.
static uint64_t look_at_tile(Block& block, int64_t key) {
  uint64_t cover = 0;
  if (block.ascends) {
    while (block.begin < block.rows && block.hi[block.begin] <= key) ++block.begin;
    block.end = block.begin;
    while (block.end < block.rows && block.lo[block.end] < key + kTileKeys) ++block.end;
  }
  for (int64_t r = block.begin; r < block.end; ++r) {
    const int64_t from = block.lo[r] > key ? block.lo[r] - key : 0;
    const int64_t to = block.hi[r] - key < kTileKeys ? block.hi[r] - key : kTileKeys;
    block.seen[r] = to > from ? ~uint64_t{0} >> (64 - (to - from)) << from : 0;
    cover |= block.seen[r];
  }
  return cover;
}

// Up to kRows rows from `first` on whose middle ones may see nothing, but not the first and the last. A tile
// that holds NaN or inf takes its rows one by one: then a row meets only keys that it sees, for 0 * NaN is
// NaN.
struct Group {
  int64_t first, rows;
  int32_t from, to;  // the hull of what they see, keys of the tile
};
MMK_INLINE bool next_group(const Block& block, int64_t after, bool finite, Group& group) {
  if (after < block.begin) after = block.begin;
  while (after < block.end && block.seen[after] == 0) ++after;
  if (after >= block.end) return false;
  uint64_t cover = 0;
  int64_t end = after;
  for (int64_t r = after; r < block.end && r < after + (finite ? kRows : 1); ++r) {
    cover |= block.seen[r];
    if (block.seen[r]) end = r + 1;
  }
  group = {after, end - after, __builtin_ctzll(cover), 64 - __builtin_clzll(cover)};
  return true;
}

// A whole float tile, `ld` floats from row to row. Two sums, since each waits for its last term.
static bool copy_tile(const float* from, int64_t ld, int64_t width, float* rows) {
  Vec zero{}, other{};
  for (int64_t j = 0; j < kTileKeys; ++j, from += ld, rows += width)
    for (int64_t i = 0; i < width; i += 2 * W) {
      const Vec a = load(from + i), b = load(from + i + W);
      zero = fma(a, Vec{}, zero);
      other = fma(b, Vec{}, other);
      store(rows + i, a);
      store(rows + i + W, b);
    }
  return reduce_sum(zero + other) == 0.f;
}

// Rows [64, width] of the tile's keys or values: those that someone sees, the others as 0. Returns true if
// all are finite.
static bool load_tile(const IntervalAttention& p, const Tokens& x, const Block& block, int64_t key,
                      uint64_t cover, float* rows) {
  const int64_t width = padded_width(p);
  if (p.keys == Dtype::f32 && cover == ~uint64_t{0} && p.D % (2 * W) == 0)
    return copy_tile(static_cast<const float*>(row_of(x, p.keys, block.b, key, block.g)), x.t, width, rows);
  Vec zero{};
  for (int64_t j = 0; j < kTileKeys; ++j, rows += width) {
    if (cover >> j & 1)
      zero = widen(p.keys, row_of(x, p.keys, block.b, key + j, block.g), p.D, 1.f, rows, width, zero);
    else
      fill_zero(rows, width);
  }
  return reduce_sum(zero) == 0.f;
}

// The same, transposed: columns [width, 64]. Whole float tiles need no copy in between; `rows` is workspace.
static void load_transposed(const IntervalAttention& p, const Tokens& x, const Block& block, int64_t key,
                            uint64_t cover, float* rows, float* columns) {
  const int64_t width = padded_width(p);
  if (p.keys == Dtype::f32 && cover == ~uint64_t{0}) {
    const void* first = row_of(x, p.keys, block.b, key, block.g);
    transpose(static_cast<const float*>(first), kTileKeys, p.D, x.t, columns);
    return;
  }
  load_tile(p, x, block, key, cover, rows);
  transpose(rows, kTileKeys, width, width, columns);
}

// While group g is computed: asks for the rows after it, and for the next tile, a few rows at a time.
MMK_INLINE void ask_ahead(const IntervalAttention& p, const Tokens& x, const Block& block, const Group& g) {
  const int64_t end = g.first + g.rows;
  for (int64_t r = end; r < end + kRows && r < block.rows; ++r)
    if (!block.loaded[r])
      prefetch(row_of(x, p.rows, block.b, block.t[r], block.h[r]), p.D * bytes_of(p.rows));
}
// Called four times a group, so that memory is asked for evenly: an image may have few rows, and a burst of
// requests fills the line buffers that the products' own loads need.
constexpr int64_t kAskedKeys = 4;
MMK_INLINE void ask_for_tile(const IntervalAttention& p, const Block& block, int64_t key, int64_t& asked) {
  for (const int64_t end = asked + kAskedKeys; asked < end && asked < kTileKeys && key + asked < p.J;
       ++asked) {
    prefetch(row_of(p.k, p.keys, block.b, key + asked, block.g), p.D * bytes_of(p.keys));
    prefetch(row_of(p.v, p.keys, block.b, key + asked, block.g), p.D * bytes_of(p.keys));
  }
}
MMK_INLINE void ask_for_values(const IntervalAttention& p, const Block& block, int64_t key) {
  for (int64_t j = 0; j < kTileKeys && key + j < p.J; ++j)
    prefetch(row_of(p.v, p.keys, block.b, key + j, block.g), p.D * bytes_of(p.keys));
}

// How the products q k of a row with the tile's keys, already scaled, become scores. `plain`: they are the
// scores.
struct ScoreRule {
  bool plain, uniform;
  float slope;   // 0 without ALiBi
  float origin;  // hi - 1 - the tile's first key: ALiBi's distance is j - origin
  uint64_t seen;
};
MMK_INLINE ScoreRule score_rule(const IntervalAttention& p, const Block& block, int64_t r, int64_t key) {
  const bool plain = block.seen[r] == ~uint64_t{0} && !block.uniform[r] && !p.slopes && !p.threshold;
  const float slope = p.slopes ? p.slopes[block.h[r]] : 0.f;
  return {plain, block.uniform[r], slope, static_cast<float>(block.hi[r] - 1 - key), block.seen[r]};
}
MMK_INLINE Vec lane_index(int vec) { return __builtin_convertvector(SVec(lanes()) + vec * W, Vec); }
// The scores of vector `vec`; `unseen` where the row does not see.
MMK_INLINE Vec score(const ScoreRule& rule, Vec product, int vec, float unseen) {
  if (rule.uniform)
    product = Vec{};
  else if (rule.slope != 0.f)
    product = fma(lane_index(vec) - splat(rule.origin), splat(rule.slope), product);
  return select(rule.seen >> (vec * W), product, splat(unseen));
}

// The hash state of a row; `kept` has all bits set in the lanes of the keys that stay.
MMK_INLINE uint32_t dropout_state(const IntervalAttention& p, const Block& block, int64_t r) {
  const int64_t row = (block.b * p.T + block.t[r]) * p.H + block.h[r];
  return mix(static_cast<uint32_t>(row) ^ mix(p.seed));
}
MMK_INLINE IVec kept(const IntervalAttention& p, uint32_t state, int64_t key, int vec) {
  const IVec j = lanes() + static_cast<uint32_t>(key + vec * W);
  return (IVec)(mix(j ^ state) >= p.threshold);
}

}  // namespace MMKERNELS_ISA
}  // namespace mmkernels
