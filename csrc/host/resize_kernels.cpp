// The loops of a separable resize, compiled once per instruction set (see ../common/isa.h).
//
// Integers as Pillow's: 22 fractional bits, sums modulo 2^32, rounded to a byte after either axis. A weight
// is split in two halves of 16 bits, so that pairs of taps go through one multiply-add; sums are exact in any
// order.
#include <cstring>

#include "resize.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace mmkernels {
namespace MMKERNELS_ISA {

namespace {

constexpr int BITS = 22;

[[maybe_unused]] int32_t weight(const int16_t* fixed, int tap) {
  const int16_t* group = fixed + tap / 4 * 8;
  return group[4 + tap % 4] * 32768 + group[tap % 4];
}

[[maybe_unused]] uint8_t byte(uint32_t sum) {
  const int32_t v = static_cast<int32_t>(sum + (1u << (BITS - 1))) >> BITS;
  return static_cast<uint8_t>(v < 0 ? 0 : v > 255 ? 255 : v);
}

}  // namespace

#if defined(__AVX2__)

void across(const Across& a) {
  const __m256i pairs = _mm256_setr_epi8(0, -1, 3, -1, 1, -1, 4, -1, 2, -1, 5, -1, -1, -1, -1, -1,  //
                                         6, -1, 9, -1, 7, -1, 10, -1, 8, -1, 11, -1, -1, -1, -1, -1);
  const __m256i lows = _mm256_setr_epi8(0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3,  //
                                        4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7);
  const __m256i highs = _mm256_add_epi8(lows, _mm256_set1_epi8(8));
  for (int x = 0; x < a.width; ++x) {
    const int16_t* fixed = a.taps.fixed + static_cast<int64_t>(x) * a.taps.groups * 8;
    const int groups = (a.taps.count[x] + 3) / 4;
    const int64_t at = 3 * static_cast<int64_t>(a.taps.first[x]);
    __m256i low[4], high[4];
    for (int r = 0; r < 4; ++r) low[r] = high[r] = _mm256_setzero_si256();
    for (int g = 0; g < groups; ++g) {
      const __m256i k = _mm256_broadcastsi128_si256(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(fixed + static_cast<int64_t>(8) * g)));
      const __m256i l = _mm256_shuffle_epi8(k, lows), h = _mm256_shuffle_epi8(k, highs);
      for (int r = 0; r < 4; ++r) {
        const __m128i* from = reinterpret_cast<const __m128i*>(a.rows[r] + at + static_cast<int64_t>(12) * g);
        const __m256i p = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(from)), pairs);
        low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(p, l));
        high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(p, h));
      }
    }
    __m128i sum[4];
    for (int r = 0; r < 4; ++r) {
      const __m256i both = _mm256_add_epi32(low[r], _mm256_slli_epi32(high[r], 15));
      const __m128i all = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
      sum[r] = _mm_srai_epi32(_mm_add_epi32(all, _mm_set1_epi32(1 << (BITS - 1))), BITS);
    }
    const __m128i bytes = _mm_packus_epi16(_mm_packs_epi32(sum[0], sum[1]), _mm_packs_epi32(sum[2], sum[3]));
    alignas(16) uint32_t pixel[4];
    _mm_store_si128(reinterpret_cast<__m128i*>(pixel), bytes);
    for (int r = 0; r < 4; ++r) std::memcpy(a.out[r] + static_cast<int64_t>(3) * x, &pixel[r], 4);
  }
}

void down(const Down& a) {
  for (int at = 0; at < a.bytes; at += 16) {
    __m256i low[2], high[2];
    for (int half = 0; half < 2; ++half) low[half] = high[half] = _mm256_setzero_si256();
    for (int pair = 0; pair < a.pairs; ++pair) {
      const int16_t* group = a.fixed + pair / 2 * 8 + pair % 2 * 2;
      int32_t two[2];
      std::memcpy(&two[0], group, 4);
      std::memcpy(&two[1], group + 4, 4);
      const __m256i l = _mm256_set1_epi32(two[0]), h = _mm256_set1_epi32(two[1]);
      const __m128i even = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a.rows[2 * pair] + at));
      const __m128i odd = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a.rows[2 * pair + 1] + at));
      const __m256i p[2] = {_mm256_cvtepu8_epi16(_mm_unpacklo_epi8(even, odd)),
                            _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(even, odd))};
      for (int half = 0; half < 2; ++half) {
        low[half] = _mm256_add_epi32(low[half], _mm256_madd_epi16(p[half], l));
        high[half] = _mm256_add_epi32(high[half], _mm256_madd_epi16(p[half], h));
      }
    }
    __m256i sum[2];
    for (int half = 0; half < 2; ++half) {
      sum[half] = _mm256_add_epi32(low[half], _mm256_slli_epi32(high[half], 15));
      sum[half] = _mm256_srai_epi32(_mm256_add_epi32(sum[half], _mm256_set1_epi32(1 << (BITS - 1))), BITS);
    }
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(sum[0], sum[1]), 0xd8);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    if (at + 16 <= a.bytes) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(a.out + at), bytes);
    } else {
      alignas(16) uint8_t rest[16];
      _mm_store_si128(reinterpret_cast<__m128i*>(rest), bytes);
      std::memcpy(a.out + at, rest, a.bytes - at);
    }
  }
}

#else

void across(const Across& a) {
  for (int r = 0; r < 4; ++r)
    for (int x = 0; x < a.width; ++x) {
      const int16_t* fixed = a.taps.fixed + static_cast<int64_t>(x) * a.taps.groups * 8;
      const uint8_t* from = a.rows[r] + 3 * static_cast<int64_t>(a.taps.first[x]);
      uint32_t sum[3] = {0, 0, 0};
      for (int tap = 0; tap < a.taps.count[x]; ++tap)
        for (int c = 0; c < 3; ++c)
          sum[c] += static_cast<uint32_t>(weight(fixed, tap)) * from[3 * static_cast<int64_t>(tap) + c];
      for (int c = 0; c < 3; ++c) a.out[r][3 * static_cast<int64_t>(x) + c] = byte(sum[c]);
    }
}

void down(const Down& a) {
  for (int at = 0; at < a.bytes; ++at) {
    uint32_t sum = 0;
    for (int tap = 0; tap < 2 * a.pairs; ++tap)
      sum += static_cast<uint32_t>(weight(a.fixed, tap)) * a.rows[tap][at];
    a.out[at] = byte(sum);
  }
}

#endif

void real_down(const RealDown& a) {
  std::memset(a.out, 0, sizeof(float) * a.bytes);
  int tap = 0;
  for (; tap + 4 <= a.count; tap += 4) {
    const uint8_t* const* rows = a.rows + tap;
    const uint8_t *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
    const float* w = a.weights + tap;
    const float w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
    float* __restrict out = a.out;
    for (int at = 0; at < a.bytes; ++at) out[at] += (w0 * r0[at] + w1 * r1[at]) + (w2 * r2[at] + w3 * r3[at]);
  }
  for (; tap < a.count; ++tap) {
    const uint8_t* row = a.rows[tap];
    const float w = a.weights[tap];
    float* __restrict out = a.out;
    for (int at = 0; at < a.bytes; ++at) out[at] += w * row[at];
  }
}

void real_across(const RealAcross& a) {
  for (int x = 0; x < a.width; ++x) {
    const float* weights = a.taps.real + static_cast<int64_t>(x) * a.taps.groups * 4;
    const float* from = a.row + 3 * static_cast<int64_t>(a.taps.first[x]);
    float r = 0, g = 0, b = 0;
    for (int tap = 0; tap < a.taps.count[x]; ++tap, from += 3) {
      r += weights[tap] * from[0];
      g += weights[tap] * from[1];
      b += weights[tap] * from[2];
    }
    float* out = a.out + static_cast<int64_t>(3) * x;
    out[0] = r, out[1] = g, out[2] = b;
  }
}

}  // namespace MMKERNELS_ISA
}  // namespace mmkernels
