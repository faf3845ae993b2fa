// Interval attention on CPU, backward. Built once per instruction set; torch-free.
//
//   ds = p (dp - delta) with p = exp(s - lse), dp = dout v^T, delta = <dout, out> - dlse
//   dv = p^T dout    dk = scale ds^T q    dq = scale ds k
//
// Plan. A task owns a key head (or a fixed share of its query rows) and walks blocks of rows as the forward
// does. For each tile of keys it lays down k, k^T and v^T, computes p and ds for up to 60 rows at a time, six
// by six, into buffers [60, 64] that stay in L1, adds ds k to the block's dq, and after the 60 rows adds p^T
// dout and ds^T q to the tile's dv and dk. These go to the task's float sums [J, width] once per block; at
// the end the sums of all shares are added in order. Nothing is shared between tasks, so there are no
// atomics, and the result does not depend on the threads.
#include "cpu_block.h"

namespace mmkernels {
namespace MMKERNELS_ISA {

constexpr int kStripRows = 10 * kRows;

struct Backward {
  float *q, *dout, *dq;       // [rows, width]; q times scale
  float *k, *kt, *vt, *rows;  // tile: [64, width], [width, 64] twice, and what is transposed
  float *dk, *dv;             // tile: [64, width]
  float *p, *ds;              // strip: [60, 64]
  float lse[kBlockRows], delta[kBlockRows], dlse[kBlockRows];
};

int64_t backward_floats(const IntervalAttention& p) {
  return (3 * kBlockRows + 6 * kTileKeys) * padded_width(p) + 2 * kStripRows * kTileKeys;
}

// Sums of a task: dk and dv [tiles * 64, width], then one float per tile that says whether anything stands
// there.
int64_t sums_floats(const IntervalAttention& p) {
  return tiles_of(p) * (2 * kTileKeys * padded_width(p) + 1);
}

static void load_row(const IntervalAttentionBackward& p, Block& block, Backward& w, int64_t r) {
  const int64_t width = padded_width(p), b = block.b, t = block.t[r], h = block.h[r];
  float *q = w.q + r * width, *dout = w.dout + r * width, *out = w.rows;
  block.loaded[r] = true;
  fill_zero(w.dq + r * width, width);
  if (block.learns(r))
    widen(p.rows, row_of(p.q, p.rows, b, t, h), p.D, p.scale, q, width);
  else
    fill_zero(q, width);
  if (block.empty(r)) {
    fill_zero(dout, width);
    return;
  }
  widen(p.rows, row_of(p.dout, p.rows, b, t, h), p.D, 1.f, dout, width);
  widen(p.rows, row_of(p.out, p.rows, b, t, h), p.D, 1.f, out, width);
  Vec delta{};
  for (int64_t i = 0; i < width; i += W) delta = fma(load(dout + i), load(out + i), delta);
  const float* dlse = static_cast<const float*>(p.dlse.p);
  w.delta[r] = reduce_sum(delta);
  w.dlse[r] = dlse ? dlse[at(p.dlse, b, h, t)] : 0.f;
  w.lse[r] = static_cast<const float*>(p.lse.p)[at(p.lse, b, h, t)];
}

static void store_row(const IntervalAttentionBackward& p, const Block& block, const Backward& w, int64_t r) {
  const int64_t width = padded_width(p);
  if (!block.learns(r)) fill_zero(w.dq + r * width, width);
  narrow(p.rows, w.dq + r * width, p.D, p.scale, row_of(p.dq, p.rows, block.b, block.t[r], block.h[r]));
}

// From products s and dp (in the strip's buffers) to p with dropout and ds, both 0 where the row does not
// see.
static void weigh_row(const IntervalAttention& p, const Block& block, const Backward& w, int64_t r,
                      int64_t key, int from, int to, float* s, float* dp) {
  const ScoreRule rule = score_rule(p, block, r, key);
  const Vec lse = splat(w.lse[r]), delta = splat(w.delta[r] - w.dlse[r]);
  if (rule.plain) {
#pragma GCC unroll 16
    for (int n = 0; n < kTileKeys / W; ++n) {
      const Vec x = exp(load(s + n * W) - lse);
      store(s + n * W, x);
      store(dp + n * W, x * (load(dp + n * W) - delta));
    }
    return;
  }
  const uint32_t state = p.threshold ? dropout_state(p, block, r) : 0;
  const Vec scale = splat(1.f / (1.f - p.dropout_p));
  const bool alone = block.hi[r] - block.lo[r] == 1;  // one key: dp is delta, which rounding must not deny
  for (int n = 0; n < kTileKeys / W; ++n) {
    Vec weight{}, ds{};
    if (n >= from && n < to && rule.seen) {
      const uint64_t seen = rule.seen >> (n * W);  // a row whose own keys are NaN has NaN for lse
      weight = select(seen, exp(score(rule, load(s + n * W), n, -__builtin_inff()) - lse), Vec{});
      const IVec keep = p.threshold ? kept(p, state, key, n) : ~IVec{};
      const Vec slope = (Vec)((IVec)load(dp + n * W) & keep) * scale;
      if (!rule.uniform) ds = select(seen, weight * (alone ? splat(w.dlse[r]) : slope - delta), Vec{});
      weight = (Vec)((IVec)weight & keep) * scale;
    }
    store(s + n * W, weight);
    store(dp + n * W, ds);
  }
}

// Adds the strip's `rows` rows from `first` on to the tile's dk and dv.
static void close_strip(const Backward& w, int64_t width, int64_t first, int64_t rows) {
  const float *q = w.q + first * width, *dout = w.dout + first * width;
  gemm(kTileKeys, width / W, {w.p, 1, kTileKeys}, dout, width, w.dv, width, rows, Start::add);
  gemm(kTileKeys, width / W, {w.ds, 1, kTileKeys}, q, width, w.dk, width, rows, Start::add);
}

// Adds the tile's dk and dv to the task's sums: exact zeros where no row sees the key.
static void close_tile(const IntervalAttention& p, const Backward& w, int64_t tile, uint64_t cover,
                       float* sums) {
  const int64_t width = padded_width(p), size = kTileKeys * width, tiles = tiles_of(p);
  float *dk = sums + tile * size, *dv = dk + tiles * size, *touched = sums + 2 * tiles * size + tile;
  for (int64_t i = 0; i < size; i += W) {
    const bool covered = cover >> (i / width) & 1;
    const Vec a = covered ? load(w.dk + i) : Vec{}, b = covered ? load(w.dv + i) : Vec{};
    store(dk + i, *touched != 0.f ? load(dk + i) + a : a);
    store(dv + i, *touched != 0.f ? load(dv + i) + b : b);
  }
  *touched = 1.f;
}

static void differentiate_tile(const IntervalAttentionBackward& p, Block& block, Backward& w, int64_t tile,
                               float* sums) {
  const int64_t width = padded_width(p), key = tile * kTileKeys;
  const uint64_t cover = look_at_tile(block, key);
  if (cover == 0) return;
  const bool finite = load_tile(p, p.k, block, key, cover, w.k);
  transpose(w.k, kTileKeys, width, width, w.kt);
  load_transposed(p, p.v, block, key, cover, w.rows, w.vt);
  fill_zero(w.dk, 2 * kTileKeys * width);
  Group g;
  int64_t first = 0, rows = 0;  // of the strip
  int64_t asked = 0;
  for (int64_t after = 0; next_group(block, after, finite, g); after = g.first + g.rows) {
    ask_ahead(p, p.q, block, g);
    ask_ahead(p, p.dout, block, g);
    ask_ahead(p, p.out, block, g);
    ask_for_tile(p, block, key + kTileKeys, asked);
    for (int64_t r = g.first; r < g.first + g.rows; ++r)
      if (!block.loaded[r]) load_row(p, block, w, r);
    if (g.first != first + rows || rows + g.rows > kStripRows) {
      close_strip(w, width, first, rows);
      first = g.first;
      rows = 0;
    }
    const int from = g.from / W, to = (g.to + W - 1) / W;
    float *s = w.p + rows * kTileKeys, *dp = w.ds + rows * kTileKeys;
    gemm(g.rows, to - from, {w.q + g.first * width, width, 1}, w.kt + from * W, kTileKeys, s + from * W,
         kTileKeys, p.D, Start::zero);
    gemm(g.rows, to - from, {w.dout + g.first * width, width, 1}, w.vt + from * W, kTileKeys, dp + from * W,
         kTileKeys, p.D, Start::zero);
    for (int64_t i = 0; i < g.rows; ++i)
      weigh_row(p, block, w, g.first + i, key, from, to, s + i * kTileKeys, dp + i * kTileKeys);
    gemm(g.rows, width / W, {dp + g.from, kTileKeys, 1}, w.k + g.from * width, width, w.dq + g.first * width,
         width, g.to - g.from, Start::add);
    for (int64_t r = g.first; r < g.first + g.rows; ++r)
      if (block.seen[r] && block.hi[r] <= key + kTileKeys) store_row(p, block, w, r);
    rows += g.rows;
  }
  close_strip(w, width, first, rows);
  close_tile(p, w, tile, cover, sums);
}

// dk and dv of key head g, tile `tile`: the sums of all shares, in order.
static void combine_tile(const IntervalAttentionBackward& p, int64_t b, int64_t g, int64_t tile,
                         const float* sums, float* row) {
  const int64_t width = padded_width(p), half = tiles_of(p) * kTileKeys * width, shares = shares_of(p);
  const int64_t end = (tile + 1) * kTileKeys < p.J ? (tile + 1) * kTileKeys : p.J;
  for (int64_t j = tile * kTileKeys; j < end; ++j)
    for (int which = 0; which < 2; ++which) {
      fill_zero(row, width);
      for (int64_t s = 0; s < shares; ++s) {
        const float* share = sums + s * sums_floats(p);
        if (share[2 * half + tile] == 0.f) continue;
        const float* x = share + which * half + j * width;
        for (int64_t i = 0; i < width; i += W) store(row + i, load(row + i) + load(x + i));
      }
      narrow(p.keys, row, p.D, 1.f, row_of(which ? p.dv : p.dk, p.keys, b, j, g));
    }
}

// Task: share `task % shares` of key head `task / shares`; `sums` belong to the task.
void backward(const IntervalAttentionBackward& p, int64_t task, float* workspace, float* sums) {
  const int64_t width = padded_width(p), shares = shares_of(p), blocks = blocks_of(p), tiles = tiles_of(p);
  const int64_t share = task % shares, g = task / shares % p.G, b = task / shares / p.G;
  Backward w;
  w.q = workspace;
  w.dout = w.q + kBlockRows * width;
  w.dq = w.dout + kBlockRows * width;
  w.k = w.dq + kBlockRows * width;
  w.kt = w.k + kTileKeys * width;
  w.vt = w.kt + kTileKeys * width;
  w.rows = w.vt + kTileKeys * width;
  w.dk = w.rows + kTileKeys * width;
  w.dv = w.dk + kTileKeys * width;
  w.p = w.dv + kTileKeys * width;
  w.ds = w.p + kStripRows * kTileKeys;
  fill_zero(sums + 2 * tiles * kTileKeys * width, tiles);
  for (int64_t index = blocks * share / shares; index < blocks * (share + 1) / shares; ++index) {
    Block block;
    open_block(p, b, g, index, block);
    for (int64_t r = 0; r < block.rows; ++r)
      if (block.empty(r)) store_row(p, block, w, r);
    for (int64_t tile = block.least / kTileKeys; tile * kTileKeys < block.most; ++tile)
      differentiate_tile(p, block, w, tile, sums);
  }
}

// Writes dk and dv of key head `head` from the sums of its shares. `row` is workspace.
void combine(const IntervalAttentionBackward& p, int64_t head, const float* sums, float* row) {
  for (int64_t tile = 0; tile < tiles_of(p); ++tile) combine_tile(p, head / p.G, head % p.G, tile, sums, row);
}

}  // namespace MMKERNELS_ISA
}  // namespace mmkernels
