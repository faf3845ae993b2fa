// Small products of matrices that already lie in cache: C = C * alpha + A B, by register blocks of up to 6
// rows x N vectors. Torch-free; see vec.h for the namespace.
#pragma once

#include "vec.h"

namespace mmkernels {
namespace MMKERNELS_ISA {

constexpr int kRows = 6;
constexpr int kVecs =
    W == 16 ? 4 : 2;  // 6 x 4 of 32 registers, 6 x 2 of 16: what is left holds B's row and A's element

struct Strided {  // element (r, k) of A stands at p[r * row + k * col]
  const float* p;
  int64_t row, col;
};

// What the product is added to: 0, C, or C with row r multiplied by alpha[r].
enum class Start { zero, add, scale };

// The longest sum in one register: one chain of 256 has twice the rounding error of 8 chains of 32.
// Without fma every term rounds twice.
constexpr int64_t kChain = W == 4 ? 16 : 32;

template <int M, int N>
static void register_block(Strided a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth,
                           Start start, const float* alpha) {
  for (;;) {
    Vec acc[M][N] = {};
    for (int64_t end = depth < kChain ? depth : kChain; end > 0; --end, --depth) {
      Vec row[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) row[n] = load(b + n * W);
#pragma GCC unroll 6
      for (int r = 0; r < M; ++r) {
        const Vec x = splat(a.p[r * a.row]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[r][n] = fma(x, row[n], acc[r][n]);
      }
      a.p += a.col;
      b += ldb;
    }
#pragma GCC unroll 6
    for (int r = 0; r < M; ++r) {
      const Vec factor = start == Start::scale ? splat(alpha[r]) : splat(1.f);
      float* to = c + r * ldc;
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
        store(to + n * W, start == Start::zero ? acc[r][n] : fma(load(to + n * W), factor, acc[r][n]));
    }
    if (depth <= 0) return;
    start = Start::add;
  }
}

typedef void (*RegisterBlock)(Strided, const float*, int64_t, float*, int64_t, int64_t, Start, const float*);

template <int N>
MMK_INLINE RegisterBlock block_of(int rows) {
  static constexpr RegisterBlock of[] = {register_block<1, N>, register_block<2, N>, register_block<3, N>,
                                         register_block<4, N>, register_block<5, N>, register_block<6, N>};
  return of[rows - 1];
}
MMK_INLINE RegisterBlock block_of(int rows, int vecs) {
  if constexpr (kVecs == 4) {
    if (vecs == 4) return block_of<4>(rows);
    if (vecs == 3) return block_of<3>(rows);
  }
  return vecs == 2 ? block_of<2>(rows) : block_of<1>(rows);
}

// C [rows, vecs * W] from A [rows, depth] and B [depth, vecs * W]. A last block of a single vector would
// leave most of the machine idle, so what remains after whole blocks is split in equal parts: 5 vectors are 3
// + 2.
MMK_INLINE void gemm(int rows, int vecs, Strided a, const float* b, int64_t ldb, float* c, int64_t ldc,
                     int64_t depth, Start start, const float* alpha = nullptr) {
  for (int n = 0, step; n < vecs; n += step) {
    const int left = vecs - n;
    step = left > 2 * kVecs || left <= kVecs ? (left < kVecs ? left : kVecs) : (left + 1) / 2;
    for (int r = 0; r < rows; r += kRows)
      block_of(rows - r < kRows ? rows - r : kRows, step)({a.p + r * a.row, a.row, a.col}, b + n * W, ldb,
                                                          c + r * ldc + n * W, ldc, depth, start, alpha + r);
  }
}

}  // namespace MMKERNELS_ISA
}  // namespace mmkernels
