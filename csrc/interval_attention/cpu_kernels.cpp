// Interval attention on CPU, forward. Built once per instruction set; torch-free.
//
// Plan. A task is a block of query rows of one key head. It walks the tiles of 64 keys that its intervals
// meet: the tile's keys are laid down transposed, its values as they are, as float in a workspace that stays
// in L1; then, six rows at a time, scores [6, 64] by register blocks, mask (only where a row does not see the
// whole tile), exp with a running maximum, and the product with the values into the block's float output,
// which stays in L2. Every key is widened and transposed once per block of rows; queries, outputs and lse
// move once.
#include "cpu_block.h"

namespace mmkernels {
namespace MMKERNELS_ISA {

constexpr int kPaddedRows = (kRows + W - 1) / W * W;

struct Forward {
  float *q, *o, *sum;  // [rows, width]: queries times scale, outputs not yet divided; [rows, W]: sums by lane
  float *rows, *kt, *v, *s;  // tile: [64, width], [width, 64], [64, width]; scores [6, 64]
  float max[kBlockRows];
};

int64_t forward_floats(const IntervalAttention& p) {
  return (2 * kBlockRows + 3 * kTileKeys) * padded_width(p) + kRows * kTileKeys + kBlockRows * W;
}

static void load_row(const IntervalAttention& p, Block& block, Forward& f, int64_t r) {
  const int64_t width = padded_width(p);
  widen(p.rows, row_of(p.q, p.rows, block.b, block.t[r], block.h[r]), p.D, p.scale, f.q + r * width, width);
  fill_zero(f.o + r * width, width);
  store(f.sum + r * W, Vec{});
  f.max[r] = -__builtin_inff();
  block.loaded[r] = true;
}

// Writes the row's output and lse; an empty row has none of its own and gives 0 and -inf.
static void store_row(const IntervalAttention& p, const Block& block, const Forward& f, int64_t r) {
  const bool empty = block.empty(r);
  const float sum = reduce_sum(load(f.sum + r * W));
  const float share = empty ? 0.f : 1.f / (sum * (1.f - p.dropout_p));
  narrow(p.rows, f.o + r * padded_width(p), p.D, share,
         row_of(p.out, p.rows, block.b, block.t[r], block.h[r]));
  static_cast<float*>(p.lse.p)[at(p.lse, block.b, block.h[r], block.t[r])] =
      empty ? -__builtin_inff() : static_cast<float>(f.max[r] + log(sum));
}

// Masks the row's scores, vectors `from` to `to` of the tile, and returns the greatest of them and `before`.
MMK_INLINE float mask_row(const ScoreRule& rule, float before, int from, int to, float* s) {
  Vec top = splat(before);
  if (rule.plain) {
#pragma GCC unroll 16
    for (int n = 0; n < kTileKeys / W; ++n) top = max(top, load(s + n * W));
  } else {
    for (int n = from; n < to; ++n) {
      const Vec x = score(rule, load(s + n * W), n, -__builtin_inff());
      top = max(top, x);
      store(s + n * W, x);
    }
  }
  return reduce_max(top);
}

// Scores become probabilities relative to `top`, dropped keys 0; returns their sum by lane, dropped keys
// included.
MMK_INLINE Vec weigh_row(const IntervalAttention& p, const Block& block, const ScoreRule& rule, int64_t r,
                         int64_t key, float top, int from, int to, float* s) {
  Vec sum{};
  if (rule.plain) {
#pragma GCC unroll 16
    for (int n = 0; n < kTileKeys / W; ++n) {
      const Vec x = exp(load(s + n * W) - splat(top));
      sum = sum + x;
      store(s + n * W, x);
    }
    return sum;
  }
  const uint32_t state = p.threshold ? dropout_state(p, block, r) : 0;
  for (int n = from; n < to; ++n) {
    Vec x = rule.seen ? exp(load(s + n * W) - splat(top)) : Vec{};
    sum = sum + x;
    if (p.threshold) x = (Vec)((IVec)x & kept(p, state, key, n));
    store(s + n * W, x);
  }
  return sum;
}

// The group's scores become probabilities; alpha[i] is what row i's sum and output so far are to be
// multiplied with.
static void soften(const IntervalAttention& p, const Block& block, Forward& f, const Group& g, int64_t key,
                   int from, int to, float* alpha) {
  ScoreRule rules[kRows];
  float top[kPaddedRows] = {};
  for (int i = 0; i < g.rows; ++i) {
    rules[i] = score_rule(p, block, g.first + i, key);
    top[i] = mask_row(rules[i], f.max[g.first + i], from, to, f.s + i * kTileKeys);
    alpha[i] = f.max[g.first + i];
  }
  for (int i = 0; i < kPaddedRows; i += W) {  // a row that has seen nothing yet has no maximum to leave
    const Vec before = load(alpha + i), now = load(top + i);
    store(alpha + i, before == now ? splat(1.f) : exp(before - now));
  }
  for (int i = 0; i < g.rows; ++i) {
    const int64_t r = g.first + i;
    const Vec sum = weigh_row(p, block, rules[i], r, key, top[i], from, to, f.s + i * kTileKeys);
    store(f.sum + r * W, fma(load(f.sum + r * W), splat(alpha[i]), sum));
    f.max[r] = top[i];
  }
}

static void attend_tile(const IntervalAttention& p, Block& block, Forward& f, int64_t key, bool first) {
  const uint64_t cover = look_at_tile(block, key);
  if (cover == 0) return;
  const int64_t width = padded_width(p);
  if (first) ask_for_values(p, block, key);  // they come while the keys are transposed
  load_transposed(p, p.k, block, key, cover, f.rows, f.kt);
  const bool finite = load_tile(p, p.v, block, key, cover, f.v);
  Group g;
  int64_t asked = 0;
  for (int64_t after = 0; next_group(block, after, finite, g); after = g.first + g.rows) {
    ask_ahead(p, p.q, block, g);
    ask_for_tile(p, block, key + kTileKeys, asked);
    for (int64_t r = g.first; r < g.first + g.rows; ++r)
      if (!block.loaded[r]) load_row(p, block, f, r);
    const int from = g.from / W, to = (g.to + W - 1) / W;
    gemm(g.rows, to - from, {f.q + g.first * width, width, 1}, f.kt + from * W, kTileKeys, f.s + from * W,
         kTileKeys, p.D, Start::zero);
    ask_for_tile(p, block, key + kTileKeys, asked);
    float alpha[kPaddedRows] = {};
    soften(p, block, f, g, key, from, to, alpha);
    ask_for_tile(p, block, key + kTileKeys, asked);
    gemm(g.rows, width / W, {f.s + g.from, kTileKeys, 1}, f.v + g.from * width, width, f.o + g.first * width,
         width, g.to - g.from, Start::scale, alpha);
    ask_for_tile(p, block, key + kTileKeys, asked);
    for (int64_t r = g.first; r < g.first + g.rows; ++r)
      if (block.seen[r] && block.hi[r] <= key + kTileKeys) store_row(p, block, f, r);
  }
}

void forward(const IntervalAttention& p, int64_t task, float* workspace) {
  const int64_t width = padded_width(p), head = task % p.G, batch = task / p.G % p.B;
  Block block;
  open_block(p, batch, head, blocks_of(p) - 1 - task / p.G / p.B,
             block);  // causal masks: the longest blocks first
  Forward f;
  f.q = workspace;
  f.o = f.q + kBlockRows * width;
  f.rows = f.o + kBlockRows * width;
  f.kt = f.rows + kTileKeys * width;
  f.v = f.kt + kTileKeys * width;
  f.s = f.v + kTileKeys * width;
  f.sum = f.s + kRows * kTileKeys;
  for (int64_t r = 0; r < block.rows; ++r) {
    if (!block.empty(r)) continue;
    fill_zero(f.o + r * width, width);
    store_row(p, block, f, r);
  }
  for (int64_t key = block.least / kTileKeys * kTileKeys; key < block.most; key += kTileKeys)
    attend_tile(p, block, f, key, key <= block.least);
}

}  // namespace MMKERNELS_ISA
}  // namespace mmkernels
