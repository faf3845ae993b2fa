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

struct Forward {
  float *q, *o;              // [rows, width]: queries times scale; outputs not yet divided
  float *rows, *kt, *v, *s;  // tile: [64, width], [width, 64], [64, width]; scores [6, 64]
  float max[kBlockRows], sum[kBlockRows];
};

int64_t forward_floats(const IntervalAttention& p) {
  return (2 * kBlockRows + 3 * kTileKeys) * padded_width(p) + kRows * kTileKeys;
}

// Scores become probabilities relative to the row's new maximum, 0 where the row does not see; returns what
// the sums and outputs so far must be multiplied with.
static float soft_row(const IntervalAttention& p, const Block& block, Forward& f, int64_t r, int64_t key,
                      int from, int to, float* s) {
  const uint64_t seen = block.seen[r];
  const ScoreRule rule = score_rule(p, block, r, key);
  Vec top = splat(f.max[r]);
  for (int n = from; n < to; ++n) {
    Vec x = score(rule, load(s + n * W), n);
    if (seen != ~uint64_t{0}) x = select(seen >> (n * W), x, splat(-__builtin_inff()));
    top = max(top, x);
    store(s + n * W, x);
  }
  const float before = f.max[r], now = reduce_max(top);
  Vec sum{};
  const uint32_t state = p.threshold ? dropout_state(p, block, r) : 0;
  for (int n = from; n < to; ++n) {
    Vec x = seen ? exp(load(s + n * W) - splat(now)) : Vec{};
    sum = sum + x;
    if (p.threshold) x = (Vec)((IVec)x & kept(p, state, key, n));
    store(s + n * W, x);
  }
  const float alpha = now == before ? 1.f : exp(splat(before - now))[0];
  f.max[r] = now;
  f.sum[r] = f.sum[r] * alpha + reduce_sum(sum);
  return alpha;
}

static void attend_tile(const IntervalAttention& p, Block& block, Forward& f, int64_t key) {
  const uint64_t cover = look_at_tile(block, key);
  if (cover == 0) return;
  const int64_t width = padded_width(p);
  load_tile(p, p.k, block, key, cover, f.rows);
  transpose(f.rows, kTileKeys, width, width, f.kt);
  const bool finite = load_tile(p, p.v, block, key, cover, f.v);
  Group g;
  for (int64_t after = 0; next_group(block, after, finite, g); after = g.first + g.rows) {
    const int from = g.from / W, to = (g.to + W - 1) / W;
    gemm(g.rows, to - from, {f.q + g.first * width, width, 1}, f.kt + from * W, kTileKeys, f.s + from * W,
         kTileKeys, p.D, Start::zero);
    float alpha[kRows];
    for (int64_t i = 0; i < g.rows; ++i)
      alpha[i] = soft_row(p, block, f, g.first + i, key, from, to, f.s + i * kTileKeys);
    gemm(g.rows, width / W, {f.s + g.from, kTileKeys, 1}, f.v + g.from * width, width, f.o + g.first * width,
         width, g.to - g.from, Start::scale, alpha);
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
  for (int64_t r = 0; r < block.rows; ++r) {
    f.max[r] = -__builtin_inff();
    f.sum[r] = 0.f;
    fill_zero(f.o + r * width, width);
    widen(p.dtype, row_of(p.q, p.dtype, batch, block.t[r], block.h[r]), p.D, p.scale, f.q + r * width, width);
  }
  for (int64_t key = block.least / kTileKeys * kTileKeys; key < block.most; key += kTileKeys)
    attend_tile(p, block, f, key);
  for (int64_t r = 0; r < block.rows; ++r) {
    const bool empty = block.lo[r] == block.hi[r];
    const float share = empty ? 0.f : 1.f / (f.sum[r] * (1.f - p.dropout_p));
    narrow(p.dtype, f.o + r * width, p.D, share, row_of(p.out, p.dtype, batch, block.t[r], block.h[r]));
    p.lse[(batch * p.H + block.h[r]) * p.T + block.t[r]] =
        empty ? -__builtin_inff() : static_cast<float>(f.max[r] + __builtin_log(f.sum[r]));
  }
}

}  // namespace MMKERNELS_ISA
}  // namespace mmkernels
