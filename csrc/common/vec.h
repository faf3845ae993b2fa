// Vectors of W floats for the kernel files that are compiled once per instruction set: AVX-512, AVX2 with FMA
// and F16C, or 4 lanes that any compiler lowers (SSE2, NEON). Torch-free. Everything here has internal
// linkage inside namespace mmkernels::MMKERNELS_ISA: no symbol of a wide build can be picked by the linker
// for a narrow CPU.
#pragma once

#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define MMK_INLINE static inline __attribute__((always_inline))

namespace mmkernels {
namespace MMKERNELS_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * W), may_alias));
typedef uint32_t IVec __attribute__((vector_size(4 * W), may_alias));  // lanes wrap around
typedef int32_t SVec __attribute__((vector_size(4 * W), may_alias));
typedef float Unaligned __attribute__((vector_size(4 * W), may_alias, aligned(4)));
typedef uint32_t UnalignedInts __attribute__((vector_size(4 * W), may_alias, aligned(2)));
typedef uint16_t Half __attribute__((vector_size(2 * W), may_alias, aligned(2)));

MMK_INLINE Vec load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
MMK_INLINE void store(float* p, Vec v) { *reinterpret_cast<Unaligned*>(p) = v; }
MMK_INLINE Vec splat(float x) { return x - Vec{}; }  // x + 0 would be computed: it turns -0 into 0
MMK_INLINE IVec lanes() {
  IVec v;
  for (int i = 0; i < W; ++i) v[i] = i;
  return v;
}

// ---- what the instruction sets spell differently: fma, max (the second operand wins on NaN), select by the
// low W bits of a mask, exp's last step p * 2^n (0 where x is below -126, for denormals are slow and mean
// nothing here), float16
#if defined(__AVX512F__)
MMK_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
MMK_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
MMK_INLINE Vec select(uint64_t bits, Vec a, Vec b) { return _mm512_mask_blend_ps(__mmask16(bits), b, a); }
MMK_INLINE Vec nearest(Vec x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
MMK_INLINE Vec ldexp(Vec p, Vec n, Vec x) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.f), _CMP_NLT_UQ), p, n);
}
MMK_INLINE Vec from_f16(Half h) { return _mm512_cvtph_ps((__m256i)h); }
MMK_INLINE Half to_f16(Vec v) { return (Half)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
#else
#if defined(__AVX2__)
MMK_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
MMK_INLINE Vec from_f16(Half h) { return _mm256_cvtph_ps((__m128i)h); }
MMK_INLINE Half to_f16(Vec v) { return (Half)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
#else
MMK_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
// float16 by arithmetic: the exponent moves by a product with 2^112 (back: 2^-112), which also makes and
// reads denormals.
MMK_INLINE Vec from_f16(Half h) {
  const IVec x = __builtin_convertvector(h, IVec), magnitude = (x & 0x7fff) << 13;
  const Vec scaled = (Vec)magnitude * 0x1p112f;
  const IVec special = ((magnitude >= (0x7c00u << 13)) & 0x7f800000u) | (IVec)scaled;
  return (Vec)(special | ((x & 0x8000) << 16));
}
MMK_INLINE Half to_f16(Vec v) {
  const IVec x = (IVec)v, magnitude = x & 0x7fffffffu;
  // Adding 2^13 ulps of the result's own last place and taking it away again rounds to nearest even,
  // denormals included.
  const IVec exponent = magnitude & 0x7f800000u;
  const Vec base = (Vec)((exponent < (113u << 23) ? IVec{} + (113u << 23) : exponent) + (13u << 23));
  const Vec rounded = ((Vec)magnitude + base) - base;
  const IVec finite = (IVec)(rounded * 0x1p-112f) >> 13;
  const IVec special = magnitude > 0x7f800000u ? IVec{} + 0x7e00u : IVec{} + 0x7c00u;
  const IVec half = rounded < 65536.f ? finite : special;
  return __builtin_convertvector(half | ((x >> 16) & 0x8000), Half);
}
#endif
#if defined(__AVX2__)
MMK_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
#else
MMK_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
#endif
MMK_INLINE Vec select(uint64_t bits, Vec a, Vec b) {
  const IVec bit = (IVec{} + 1u) << lanes();
  return (bit & uint32_t(bits)) != 0 ? a : b;
}
constexpr float kRounder = 0x1.8p23f;  // x + kRounder - kRounder is x rounded to nearest, for |x| < 2^22
MMK_INLINE Vec nearest(Vec x) { return (x + kRounder) - kRounder; }
MMK_INLINE Vec ldexp(Vec p, Vec n, Vec x) {
  const IVec power = ((IVec)(n + (kRounder + 127.f)) - (IVec)splat(kRounder)) << 23;
  return x < -126.f ? Vec{} : p * (Vec)power;
}
#endif

// Lane i receives lane i ^ distance.
MMK_INLINE Vec exchange(Vec v, uint32_t distance) {
#if defined(__clang__)
  Vec r = v;
  for (uint32_t i = 0; i < W; ++i) r[i] = v[i ^ distance];
  return r;
#else
  return __builtin_shuffle(v, lanes() ^ distance);
#endif
}
MMK_INLINE float reduce_max(Vec v) {
#pragma GCC unroll 4
  for (int d = W / 2; d > 0; d /= 2) v = max(v, exchange(v, d));
  return v[0];
}
MMK_INLINE float reduce_sum(Vec v) {
#pragma GCC unroll 4
  for (int d = W / 2; d > 0; d /= 2) v = v + exchange(v, d);
  return v[0];
}

// e^x for x <= 87, within 0.7 + |x| / 4 ulp; 0 below -87.3 (2^-126); NaN stays NaN. e^x = 2^n 2^f, where one
// fma gives the fraction f = x log2(e) - n without the rounding error of the product; minimax polynomial of
// 2^f on |f| <= 1/2.
MMK_INLINE Vec exp(Vec x) {
  const Vec log2e = splat(1.44269504088896340736f), power = x * log2e;
  const Vec n = nearest(power);
#if defined(__AVX2__)
  const Vec f = fma(x, log2e, -n);
#else  // without fma: n ln(2) in two parts, of which the first is exact
  const Vec f = (x - n * splat(0.693359375f) + n * splat(2.12194440e-4f)) * log2e;
#endif
  Vec p = fma(splat(0.0001534581242594868f), f, splat(0.0013399930903688073f));
  p = fma(p, f, splat(0.009618489071726799f));
  p = fma(p, f, splat(0.05550328642129898f));
  p = fma(p, f, splat(0.24022646248340607f));
  p = fma(p, f, splat(0.6931471824645996f));
  p = fma(p, f, splat(1.f));
  return ldexp(p, n, power);
}

// Natural logarithm of a normal positive number, to 1e-11. With x = 2^e m and m near 1: the series in (m - 1)
// / (m + 1).
MMK_INLINE double log(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if (bits - 0x00800000u >= 0x7f000000u) return __builtin_log(x);  // 0, denormal, negative, inf, NaN
  const uint32_t shifted = bits - 0x3f350000u;                     // m from 0.707 on
  const int32_t e = static_cast<int32_t>(shifted) >> 23;
  bits -= static_cast<uint32_t>(e) << 23;
  float m;
  __builtin_memcpy(&m, &bits, 4);
  const double s = (m - 1.0) / (m + 1.0), z = s * s;
  const double series =
      1 + z * (1 / 3. + z * (1 / 5. + z * (1 / 7. + z * (1 / 9. + z * (1 / 11. + z / 13)))));
  return e * 0.6931471805599453 + 2 * s * series;
}

// ---- element types of tensors: storage is read and written in them, arithmetic is float
MMK_INLINE Vec from_bf16(Half h) { return (Vec)(__builtin_convertvector(h, IVec) << 16); }
MMK_INLINE Half to_bf16(Vec v) {  // to nearest even; a NaN stays one whatever its payload
  const IVec x = (IVec)v, rounded = (x + 0x7fffu + ((x >> 16) & 1u)) >> 16;
  return __builtin_convertvector((x & 0x7fffffffu) > 0x7f800000u ? (x >> 16) | 0x40u : rounded, Half);
}

struct f32 {
  typedef float type;
  MMK_INLINE Vec get(const float* p) { return load(p); }
  MMK_INLINE void put(float* p, Vec v) { store(p, v); }
};
struct bf16 {
  typedef uint16_t type;
  MMK_INLINE Vec get(const uint16_t* p) { return from_bf16(*reinterpret_cast<const Half*>(p)); }
  MMK_INLINE void put(uint16_t* p, Vec v) { *reinterpret_cast<Half*>(p) = to_bf16(v); }
};
struct f16 {
  typedef uint16_t type;
  MMK_INLINE Vec get(const uint16_t* p) { return from_f16(*reinterpret_cast<const Half*>(p)); }
  MMK_INLINE void put(uint16_t* p, Vec v) { *reinterpret_cast<Half*>(p) = to_f16(v); }
};

// The first n < W elements; the other lanes read as 0.
template <class T>
MMK_INLINE Vec get_part(const typename T::type* p, int64_t n) {
  typename T::type whole[W] = {};
  __builtin_memcpy(whole, p, n * sizeof(*p));
  return T::get(whole);
}
template <class T>
MMK_INLINE void put_part(typename T::type* p, Vec v, int64_t n) {
  typename T::type whole[W];
  T::put(whole, v);
  __builtin_memcpy(p, whole, n * sizeof(*p));
}

// W rows x 4 columns at p become 4 rows x W columns at out.
MMK_INLINE void transpose4(const float* p, int64_t ld, float* out, int64_t ldo) {
#if defined(__AVX2__)
  Vec t[4];  // quad l of t[i] is row 4 l + i: the rest of the work stays inside quads
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const float* row = p + i * ld;
#if defined(__AVX512F__)
    __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(row));
    v = _mm512_insertf32x4(v, _mm_loadu_ps(row + 4 * ld), 1);
    v = _mm512_insertf32x4(v, _mm_loadu_ps(row + 8 * ld), 2);
    t[i] = _mm512_insertf32x4(v, _mm_loadu_ps(row + 12 * ld), 3);
  }
  const Vec a = _mm512_unpacklo_ps(t[0], t[1]), b = _mm512_unpackhi_ps(t[0], t[1]);
  const Vec c = _mm512_unpacklo_ps(t[2], t[3]), d = _mm512_unpackhi_ps(t[2], t[3]);
  store(out, _mm512_shuffle_ps(a, c, 0x44));
  store(out + ldo, _mm512_shuffle_ps(a, c, 0xee));
  store(out + 2 * ldo, _mm512_shuffle_ps(b, d, 0x44));
  store(out + 3 * ldo, _mm512_shuffle_ps(b, d, 0xee));
#else
    t[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row)), _mm_loadu_ps(row + 4 * ld), 1);
  }
  const Vec a = _mm256_unpacklo_ps(t[0], t[1]), b = _mm256_unpackhi_ps(t[0], t[1]);
  const Vec c = _mm256_unpacklo_ps(t[2], t[3]), d = _mm256_unpackhi_ps(t[2], t[3]);
  store(out, _mm256_shuffle_ps(a, c, 0x44));
  store(out + ldo, _mm256_shuffle_ps(a, c, 0xee));
  store(out + 2 * ldo, _mm256_shuffle_ps(b, d, 0x44));
  store(out + 3 * ldo, _mm256_shuffle_ps(b, d, 0xee));
#endif
#else
  for (int c = 0; c < 4; ++c)
    for (int r = 0; r < W; ++r) out[c * ldo + r] = p[r * ld + c];
#endif
}

}  // namespace MMKERNELS_ISA
}  // namespace mmkernels
