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

template <int M, int N>
static void register_block(Strided a, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth,
                           Start start, const float* alpha) {
  Vec acc[M][N] = {};
  for (int64_t k = 0; k < depth; ++k) {
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
  for (int r = 0; r < M; ++r, c += ldc) {
    const Vec factor = start == Start::scale ? splat(alpha[r]) : splat(1.f);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n)
      store(c + n * W, start == Start::zero ? acc[r][n] : fma(load(c + n * W), factor, acc[r][n]));
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

constexpr int64_t kChain = 32;

// C [rows, vecs * W] from A [rows, depth] and B [depth, vecs * W]. A last block of a single vector would
// leave most of the machine idle, so what remains after whole blocks is split in equal parts: 5 vectors are 3
// + 2. Long sums go in runs of kChain terms: one chain of 256 has twice the rounding error.
MMK_INLINE void gemm(int rows, int vecs, Strided a, const float* b, int64_t ldb, float* c, int64_t ldc,
                     int64_t depth, Start start, const float* alpha = nullptr) {
  for (int r = 0; r < rows; r += kRows) {
    const int m = rows - r < kRows ? rows - r : kRows;
    for (int n = 0, step; n < vecs; n += step) {
      const int left = vecs - n;
      step = left > 2 * kVecs || left <= kVecs ? (left < kVecs ? left : kVecs) : (left + 1) / 2;
      const RegisterBlock block = block_of(m, step);
      for (int64_t k = 0; k == 0 || k < depth; k += kChain)
        block({a.p + r * a.row + k * a.col, a.row, a.col}, b + k * ldb + n * W, ldb, c + r * ldc + n * W, ldc,
              depth - k < kChain ? depth - k : kChain, k == 0 ? start : Start::add, alpha + r);
    }
  }
}

}  // namespace MMKERNELS_ISA
}  // namespace mmkernels
