// Few rows through a weight on CPU, at the speed at which the weight can be read. Built once per instruction
// set; torch-free.
//
// Plan. A task is a block of weight rows of one group. Tiles of weight rows times rows of x keep their sums
// in registers, lanes running over channels, so a weight is read as it lies, once, and widened in registers.
// A tile of weight rows meets the rows of x one handful after another while it is in cache, and meanwhile the
// next tile is asked for, evenly: memory never waits for arithmetic, nor the reverse. Up to kBand rows of x
// stay in L2 beside the block; more take turns on it.
#include "params.h"

#include "../common/rows.h"

namespace mmkernels {
namespace MMKERNELS_ISA {

constexpr int64_t kPiece = 2048;       // channels
constexpr int64_t kLane = 64 * W;      // channels summed in one chain of every lane: see gemm.h
constexpr int64_t kStep = 4 * W;       // channels of a turn of the innermost loop
constexpr int64_t kBand = 16;          // rows of x
constexpr int kTileX = 4, kTileN = 3;  // 12 of 16 registers hold sums

// Half `half` of the 2 W channels at p, in the order in which widen_row lays down x: as they stand, but for
// bfloat16 first the even channels, then the odd ones, which takes one operation a vector.
template <class T>
MMK_INLINE Vec half_of(T, const typename T::type* p, int half) {
  return T::get(p + half * W);
}
MMK_INLINE Vec half_of(bf16, const uint16_t* p, int half) {
  const IVec both = *reinterpret_cast<const UnalignedInts*>(p);
  return (Vec)(half ? both & 0xffff0000u : both << 16);
}

// acc[r][n] += <x[r], w[n]> over 2 W channels.
template <class T, int M, int N>
MMK_INLINE void pair(const typename T::type* w, int64_t ldw, const float* x, int64_t ldx, Vec (&acc)[M][N]) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    Vec row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) row[n] = half_of(T(), w + n * ldw, half);
#pragma GCC unroll 4
    for (int r = 0; r < M; ++r) {
      const Vec v = load(x + r * ldx + half * W);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) acc[r][n] = fma(v, row[n], acc[r][n]);
    }
  }
}

// What a tile multiplies: weight rows w, rows of x, over `depth` channels; `next`: weight rows to ask for.
template <class T>
struct Tile {
  const typename T::type *w, *next;
  int64_t ldw;
  const float* x;
  int64_t ldx, depth;
  float* out;
  int64_t ldo;
  bool add;
};

// out[r, n] (+)= <x[r], w[n]>; asks for L rows of `next`.
template <class T, int M, int N, int L>
static void tile(const Tile<T>& t) {
  constexpr int64_t line = 64 / sizeof(typename T::type);
  Vec total[M][N] = {};
  for (int64_t from = 0; from < t.depth; from += kLane) {
    const int64_t to = t.depth < from + kLane ? t.depth : from + kLane;
    Vec acc[M][N] = {};
    int64_t c = from;
    for (; c + kStep <= to; c += kStep) {
#pragma GCC unroll 4
      for (int n = 0; n < L; ++n)
        for (int64_t i = 0; i < kStep; i += line) __builtin_prefetch(t.next + n * t.ldw + c + i);
      pair<T, M, N>(t.w + c, t.ldw, t.x + c, t.ldx, acc);
      pair<T, M, N>(t.w + c + 2 * W, t.ldw, t.x + c + 2 * W, t.ldx, acc);
    }
    for (; c < to; c += 2 * W) {
      const int64_t left = to - c < 2 * W ? to - c : 2 * W;
      typename T::type rest[N][2 * W] = {};
      for (int n = 0; n < N; ++n) __builtin_memcpy(rest[n], t.w + n * t.ldw + c, left * sizeof(rest[0][0]));
      pair<T, M, N>(rest[0], 2 * W, t.x + c, t.ldx, acc);
    }
    for (int r = 0; r < M; ++r)
      for (int n = 0; n < N; ++n) total[r][n] = total[r][n] + acc[r][n];
  }
  for (int r = 0; r < M; ++r)
    for (int n = 0; n < N; ++n) {
      const float sum = reduce_sum(total[r][n]);
      t.out[r * t.ldo + n] = t.add ? t.out[r * t.ldo + n] + sum : sum;
    }
}

template <class T, int N, int L>
MMK_INLINE void tile_of(int64_t rows, const Tile<T>& t) {
  if constexpr (N <= kTileN) {
    if (rows >= 4) return tile<T, 4, N, L>(t);
    if (rows == 3) return tile<T, 3, N, L>(t);
    if (rows == 2) return tile<T, 2, N, L>(t);
  }
  tile<T, 1, N, L>(t);
}

// Weight rows from n on, as long as whole tiles of N lie before n1, with `rows` rows of x; returns what is
// left. The rows of the next tile are asked for in as many parts as x has handfuls.
template <class T, int N>
static int64_t tiles(const GroupedRows& p, Tile<T> t, int64_t n, int64_t n1, int64_t rows, bool ask) {
  const Tile<T> first = t;
  const int64_t handfuls = (rows + kTileX - 1) / kTileX;
  for (; n + N <= n1; n += N) {
    t.w = first.w + n * p.row;
    const typename T::type* next = t.w + (n + 2 * N <= n1 ? N * p.row : 0);
    for (int64_t h = 0; h < handfuls; ++h) {
      const int64_t r = h * kTileX;
      t.x = first.x + r * t.ldx, t.out = first.out + r * t.ldo + n, t.next = next + h % N * p.row;
      if (N == 1 || !ask || h >= N)
        tile_of<T, N, 0>(rows - r, t);
      else if (handfuls == 1)
        tile_of<T, N, N>(rows - r, t);
      else if (handfuls == 2)
        tile_of<T, N, N == 1 ? 1 : 2>(rows - r, t);
      else
        tile_of<T, N, 1>(rows - r, t);
    }
  }
  return n;
}

template <class T>
static void block(const GroupedRows& p, const RowsOfGroup& rows, int64_t n0, int64_t n1) {
  const auto* w = static_cast<const typename T::type*>(p.weight) + rows.group * p.group;
  const int64_t ldx = padded_channels(p.C);
  for (int64_t c = 0; c < p.C; c += kPiece)
    for (int64_t r = 0; r < rows.rows; r += kBand) {
      const int64_t band = rows.rows - r < kBand ? rows.rows - r : kBand, at = rows.first + r;
      const int64_t depth = p.C - c < kPiece ? p.C - c : kPiece;
      const Tile<T> t{w + c,     nullptr, p.row, p.x + at * ldx + c, ldx, depth, p.out + at * p.out_row,
                      p.out_row, c > 0};
      int64_t n = n0;
      if (band == 1) n = tiles<T, 4>(p, t, n, n1, band, r == 0);
      n = tiles<T, kTileN>(p, t, n, n1, band, r == 0);
      tiles<T, 1>(p, t, n, n1, band, r == 0);
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
  const int64_t padded = padded_channels(p.C);
  widen(p.dtype, row, p.C, 1.f, x, padded);
  if (p.dtype != Dtype::bf16) return;
  for (int64_t c = 0; c < padded; c += 2 * W) {  // see half_of
    float apart[2 * W];
    for (int i = 0; i < W; ++i) apart[i] = x[c + 2 * i], apart[W + i] = x[c + 2 * i + 1];
    __builtin_memcpy(x + c, apart, sizeof(apart));
  }
}

}  // namespace MMKERNELS_ISA
}  // namespace mmkernels
