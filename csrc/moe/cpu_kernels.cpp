// The router's rows and the experts' sum on CPU, compiled once per instruction set. Torch-free.
//
// Plan. A row of logits is widened once into scratch that stays in L1: maximum, exponentials, their sum, and
// K rounds that each find the largest number and the first place that holds it. Nothing of T x E is written.
#include <math.h>

#include "../common/rows.h"
#include "params.h"
#include "route.h"

namespace mmkernels {
namespace MMKERNELS_ISA {
namespace {

int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

// Whether the row may have a gradient: it has neither NaN nor +inf, and a number.
bool make_finite(float* row, int64_t n) {
  bool sane = true, number = false;
  for (int64_t i = 0; i < n; ++i) {
    const float x = row[i];
    sane = sane && x <= kLargest;
    number = number || x >= -kLargest;
    row[i] = finite(x);
  }
  return sane && number;
}

// The row in scratch, finite and -inf past its end, and whether it is sane.
bool read_row(const void* logits, Dtype dtype, int64_t at, int64_t n, float* row) {
  const Vec zero = widen(dtype, element(logits, dtype, at), n, 1.f, row, n);
  bool sane = true;
  if (!(reduce_sum(zero) == 0.f)) sane = make_finite(row, n);
  for (int64_t i = n; i < padded(n); ++i) row[i] = -HUGE_VALF;
  return sane;
}

// e[i] = exp(row[i] - max); returns their sum.
float exponentials(const float* row, int64_t n, float& largest, float* e) {
  Vec top = load(row);
  for (int64_t i = W; i < n; i += W) top = max(top, load(row + i));
  largest = reduce_max(top);
  Vec sum{};
  for (int64_t i = 0; i < n; i += W) {
    const Vec x = exp(max(load(row + i) - splat(largest), splat(-200.f)));
    store(e + i, x);
    sum = sum + x;
  }
  return reduce_sum(sum);
}

// The first place of the largest number, which then is no choice any more.
int64_t take_largest(float* row, int64_t n) {
  Vec top = load(row);
  for (int64_t i = W; i < n; i += W) top = max(top, load(row + i));
  const float largest = reduce_max(top);
  int64_t at = 0;
  while (row[at] != largest) ++at;
  row[at] = -HUGE_VALF;
  return at;
}

void choose(const MoeRoute& p, int64_t t, const float* row, float* left, const float* e, float inverse_sum) {
  const int64_t n = padded(p.E);
  const float* noise = p.noise && p.rules.drop != kByNoise ? p.noise + t * p.E : nullptr;
  int32_t* experts = p.experts + t * p.K;
  int64_t j = 0;
  for (int64_t i = 0; i < n; ++i) left[i] = row[i];
  if (noise && p.rules.choices) experts[j++] = static_cast<int32_t>(take_largest(left, n));
  if (noise) {
    for (int64_t i = 0; i < p.E; ++i) left[i] = finite(row[i] + noise[i]);
    if (j) left[experts[0]] = -HUGE_VALF;
  }
  for (; j < p.K; ++j) experts[j] = static_cast<int32_t>(take_largest(left, n));
  for (j = 0; j < p.K; ++j) p.weights[t * p.K + j] = e[experts[j]] * inverse_sum;
}

// g[e] += the gradients of the chosen probabilities.
void add_weight_gradients(const MoeRouteBackward& p, int64_t t, const float* e, float* g) {
  const int32_t *experts = p.experts + t * p.K, *inverse = p.inverse + t * p.K;
  float* chosen = g + padded(p.E);
  for (int64_t j = 0; j < p.K; ++j) chosen[j] = e[experts[j]];
  for (int64_t j = 0; j < p.K; ++j)
    g[experts[j]] += chosen_gradient(p.rules.normalize, chosen, inverse, p.dweights + t * p.K, p.K, j);
}

}  // namespace

// Tokens [t0, t1): ids, chosen probabilities, and what they add to the losses. `scratch` holds 3 padded rows.
void route_rows(const MoeRoute& p, int64_t t0, int64_t t1, float* scratch, MoePart& part) {
  const int64_t n = padded(p.E);
  float *row = scratch, *left = scratch + n, *e = scratch + 2 * n;
  for (int64_t t = t0; t < t1; ++t) {
    const bool sane = read_row(p.logits, p.dtype, t * p.stride, p.E, row);
    float largest;
    const float sum = exponentials(row, n, largest, e), inverse_sum = 1.f / sum;
    choose(p, t, row, left, e, inverse_sum);
    const bool used = !p.mask || p.mask[t];
    if (used || p.rules.whole)
      for (int64_t i = 0; i < n; i += W)
        store(part.share + i, fma(load(e + i), splat(inverse_sum), load(part.share + i)));
    const double lse = static_cast<double>(largest) + log(sum);
    if (used && sane) part.square += lse * lse;
  }
}

// `scratch` holds 4 padded rows; share[e] is what p[t, e] of a counted token weighs in the auxiliary loss,
// times its gradient; square the same of the z-loss.
void route_rows_backward(const MoeRouteBackward& p, const float* share, float square, int64_t t0, int64_t t1,
                         float* scratch) {
  const int64_t n = padded(p.E);
  float *row = scratch, *e = scratch + n, *g = scratch + 2 * n;
  for (int64_t t = t0; t < t1; ++t) {
    void* to = element(p.dlogits, p.dtype, t * p.E);
    if (!read_row(p.logits, p.dtype, t * p.stride, p.E, row)) {
      fill_zero(row, n);
      narrow(p.dtype, row, p.E, 1.f, to);
      continue;
    }
    float largest;
    const float sum = exponentials(row, n, largest, e), inverse_sum = 1.f / sum;
    const bool used = !p.mask || p.mask[t];
    for (int64_t i = 0; i < n; i += W) {
      store(e + i, load(e + i) * splat(inverse_sum));
      store(g + i, used || p.rules.whole ? load(share + i) : Vec{});
    }
    add_weight_gradients(p, t, e, g);
    Vec dot{};
    for (int64_t i = 0; i < n; i += W) dot = fma(load(g + i), load(e + i), dot);
    const float lse = largest + static_cast<float>(log(sum));
    const Vec less = splat(reduce_sum(dot) - (used ? 2.f * square * lse : 0.f));
    for (int64_t i = 0; i < n; i += W) store(row + i, load(e + i) * (load(g + i) - less));
    narrow(p.dtype, row, p.E, 1.f, to);
  }
}

// Tokens [t0, t1). `scratch` holds one padded row.
void combine_rows(const MoeCombine& p, int64_t t0, int64_t t1, float* scratch) {
  const int64_t n = padded(p.C);
  for (int64_t t = t0; t < t1; ++t) {
    fill_zero(scratch, n);
    for (int64_t j = 0; j < p.K; ++j) {
      const int64_t at = p.inverse[t * p.K + j];
      if (at < 0 || at >= p.rows) continue;
      const float* y = p.y + at * p.C;
      const Vec w = splat(p.weights ? p.weights[t * p.K + j] : 1.f);
      int64_t i = 0;
      for (; i + W <= p.C; i += W) store(scratch + i, fma(load(y + i), w, load(scratch + i)));
      for (; i < p.C; ++i) scratch[i] += w[0] * y[i];
    }
    narrow(p.dtype, scratch, p.C, 1.f, element(p.out, p.dtype, t * p.C));
  }
}

}  // namespace MMKERNELS_ISA
}  // namespace mmkernels
