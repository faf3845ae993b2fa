// Few rows through a weight on CPU, at the speed at which the weight can be read. Built once per instruction
// set; torch-free.
//
// Plan. A task is a block of weight rows of one group. Tiles of weight rows times rows of x keep their sums
// in registers, lanes running over channels, so a weight is read as it lies, once, and widened in registers.
// More rows of x than a tile holds take turns on a piece of the block that stays in L2, while their own piece
// stays in L1.
#include "params.h"

#include "../common/rows.h"

namespace mmkernels {
namespace MMKERNELS_ISA {

constexpr int64_t kPiece = 1024;       // channels
constexpr int64_t kLane = 64 * W;      // channels summed in one chain of every lane: see gemm.h
constexpr int kTileX = 4, kTileN = 3;  // 12 of 16 registers hold sums

// out[r, n] (+)= <x[r], w[n]> over `depth` channels.
template <class T, int M, int N>
static void tile(const typename T::type* w, int64_t ldw, const float* x, int64_t ldx, int64_t depth,
                 float* out, int64_t ldo, bool add) {
  Vec total[M][N] = {};
  for (int64_t from = 0; from < depth; from += kLane) {
    const int64_t to = depth < from + kLane ? depth : from + kLane;
    Vec acc[M][N] = {};
    int64_t c = from;
    for (; c + W <= to; c += W) {
      Vec row[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) row[n] = T::get(w + n * ldw + c);
#pragma GCC unroll 4
      for (int r = 0; r < M; ++r) {
        const Vec v = load(x + r * ldx + c);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[r][n] = fma(v, row[n], acc[r][n]);
      }
    }
    if (c < to) {
      for (int n = 0; n < N; ++n) {
        const Vec row = get_part<T>(w + n * ldw + c, to - c);
        for (int r = 0; r < M; ++r) acc[r][n] = fma(load(x + r * ldx + c), row, acc[r][n]);
      }
    }
    for (int r = 0; r < M; ++r)
      for (int n = 0; n < N; ++n) total[r][n] = total[r][n] + acc[r][n];
  }
  for (int r = 0; r < M; ++r)
    for (int n = 0; n < N; ++n) {
      const float sum = reduce_sum(total[r][n]);
      out[r * ldo + n] = add ? out[r * ldo + n] + sum : sum;
    }
}

template <class T, int M>
static void strip(const GroupedRows& p, const typename T::type* w, const float* x, int64_t rows,
                  int64_t depth, float* out, bool add) {
  constexpr int step = M == 1 ? 4 : kTileN;
  const int64_t ldx = padded_channels(p.C);
  int64_t n = 0;
  for (; n + step <= rows; n += step)
    tile<T, M, step>(w + n * p.row, p.row, x, ldx, depth, out + n, p.out_row, add);
  for (; n < rows; ++n) tile<T, M, 1>(w + n * p.row, p.row, x, ldx, depth, out + n, p.out_row, add);
}

template <class T>
static void block(const GroupedRows& p, const RowsOfGroup& rows, int64_t n0, int64_t n1) {
  const auto* w = static_cast<const typename T::type*>(p.weight) + rows.group * p.group + n0 * p.row;
  const int64_t ldx = padded_channels(p.C), piece = rows.rows > kTileX ? kPiece : p.C;
  for (int64_t c = 0; c < p.C; c += piece) {
    const int64_t depth = p.C - c < piece ? p.C - c : piece;
    for (int64_t r = 0; r < rows.rows; r += kTileX) {
      const float* x = p.x + (rows.first + r) * ldx + c;
      float* out = p.out + (rows.first + r) * p.out_row + n0;
      const int64_t left = rows.rows - r;
      if (left >= 4)
        strip<T, 4>(p, w + c, x, n1 - n0, depth, out, c > 0);
      else if (left == 3)
        strip<T, 3>(p, w + c, x, n1 - n0, depth, out, c > 0);
      else if (left == 2)
        strip<T, 2>(p, w + c, x, n1 - n0, depth, out, c > 0);
      else
        strip<T, 1>(p, w + c, x, n1 - n0, depth, out, c > 0);
    }
  }
}

void multiply(const GroupedRows& p, const RowsOfGroup& rows, int64_t n0, int64_t n1) {
  if (p.dtype == Dtype::f32)
    block<f32>(p, rows, n0, n1);
  else if (p.dtype == Dtype::bf16)
    block<bf16>(p, rows, n0, n1);
  else
    block<f16>(p, rows, n0, n1);
}

void widen_row(const GroupedRows& p, const void* row, float* x) {
  widen(p.dtype, row, p.C, 1.f, x, padded_channels(p.C));
}

}  // namespace MMKERNELS_ISA
}  // namespace mmkernels
