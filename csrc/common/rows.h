// Rows of tensors widened to float or narrowed from it, and transposed. Torch-free; see vec.h for the
// namespace.
#pragma once

#include "dtype.h"
#include "vec.h"

namespace mmkernels {
namespace MMKERNELS_ISA {

// dst[i] = factor * src[i] for i < n, then 0 up to `padded`, a multiple of W. Returns `zero` as long as every
// product is finite, and NaN in some lane from then on.
template <class T>
MMK_INLINE Vec widen_row(const void* src, int64_t n, float factor, float* dst, int64_t padded, Vec zero) {
  const typename T::type* p = static_cast<const typename T::type*>(src);
  const Vec f = splat(factor);
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const Vec x = T::get(p + i) * f;
    zero = fma(x, Vec{}, zero);
    store(dst + i, x);
  }
  if (i < n) {
    const Vec x = get_part<T>(p + i, n - i) * f;
    zero = fma(x, Vec{}, zero);
    store(dst + i, x);
    i += W;
  }
  for (; i < padded; i += W) store(dst + i, Vec{});
  return zero;
}
static Vec widen(Dtype d, const void* src, int64_t n, float factor, float* dst, int64_t padded,
                 Vec zero = Vec{}) {
  return d == Dtype::f32    ? widen_row<f32>(src, n, factor, dst, padded, zero)
         : d == Dtype::bf16 ? widen_row<bf16>(src, n, factor, dst, padded, zero)
                            : widen_row<f16>(src, n, factor, dst, padded, zero);
}

// dst[i] = factor * src[i] for i < n.
template <class T>
static void narrow_row(const float* src, int64_t n, float factor, void* dst) {
  typename T::type* p = static_cast<typename T::type*>(dst);
  int64_t i = 0;
  for (; i + W <= n; i += W) T::put(p + i, load(src + i) * splat(factor));
  if (i < n) put_part<T>(p + i, get_part<f32>(src + i, n - i) * splat(factor), n - i);
}
MMK_INLINE void narrow(Dtype d, const float* src, int64_t n, float factor, void* dst) {
  if (d == Dtype::f32)
    narrow_row<f32>(src, n, factor, dst);
  else if (d == Dtype::bf16)
    narrow_row<bf16>(src, n, factor, dst);
  else
    narrow_row<f16>(src, n, factor, dst);
}

static inline void fill_zero(float* p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = 0.f;
}

// Asks for a row that is needed some thousand instructions from now: rows of a [T, H, D] tensor lie too far
// apart for the hardware to guess.
MMK_INLINE void prefetch(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i, 0, 2);
}

// rows [n, width] -> columns [width, n]; n a multiple of W, width of 4.
static inline void transpose(const float* rows, int64_t n, int64_t width, int64_t ld, float* columns) {
  for (int64_t r = 0; r < n; r += W)
    for (int64_t c = 0; c < width; c += 4) transpose4(rows + r * ld + c, ld, columns + c * n + r, n);
}

}  // namespace MMKERNELS_ISA
}  // namespace mmkernels
