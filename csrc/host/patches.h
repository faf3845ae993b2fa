// Where a row of a canvas goes: to its places in the packed rows of patches, normalised on the way. For
// front_end.cpp alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "front_end.h"

namespace mmkernels {

inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t to_f16(float x) {  // finite values only
  const float size = std::fabs(x);
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (size < 6.103515625e-5f) return sign | static_cast<uint16_t>(std::nearbyint(size * 16777216.f));
  uint32_t bits;
  std::memcpy(&bits, &size, 4);
  bits += 0xfff + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>(std::min<uint32_t>((bits >> 13) - (112 << 10), 0x7c00));
}

// For each patch that it crosses, `patch` pixels.
template <typename T, typename Value>
void to_patches(const Job& job, const Output& out, int64_t first, int64_t view_w, int64_t view_h,
                int64_t columns, int64_t y, Value value) {
  const int64_t p = job.patch, across = view_w / p, down = view_h / p, inside = y % view_h;
  if (inside / p >= down) return;  // a remainder that is less than a patch
  for (int64_t column = 0; column < columns; ++column) {
    const int64_t view = y / view_h * columns + column;
    T* rows = static_cast<T*>(out.rows) + (first + (view * down + inside / p) * across) * 3 * p * p;
    for (int64_t patch = 0; patch < across; ++patch, rows += 3 * p * p) {
      const int64_t x = 3 * (column * view_w + patch * p), in = inside % p * p;
      if (job.last) {
        for (int64_t i = 0; i < p; ++i)
          for (int c = 0; c < 3; ++c) rows[3 * (in + i) + c] = value(x + 3 * i + c, c);
      } else {
        T *r = rows + in, *g = r + p * p, *b = g + p * p;
        for (int64_t i = 0; i < p; ++i) {
          r[i] = value(x + 3 * i, 0), g[i] = value(x + 3 * i + 1, 1), b[i] = value(x + 3 * i + 2, 2);
        }
      }
    }
  }
}

inline void put_bytes(const Job& job, const Output& out, const uint8_t* row, int64_t y) {
  const auto put = [&](auto element) {
    using T = decltype(element);
    const T* table = static_cast<const T*>(out.table);
    to_patches<T>(job, out, job.first, job.view_w, job.view_h, job.columns, y,
                  [&](int64_t at, int c) { return table[256 * c + row[at]]; });
  };
  out.element == Element::f32 ? put(float()) : put(uint16_t());
}

inline void put_reals(const Job& job, const Output& out, bool whole, const float* row, int64_t y) {
  const float scale[3] = {float(out.scale[0]), float(out.scale[1]), float(out.scale[2])};
  const float shift[3] = {float(out.shift[0]), float(out.shift[1]), float(out.shift[2])};
  const auto put = [&](auto element, auto round) {
    const int64_t first = whole ? job.whole_first : job.first, w = whole ? job.whole_w : job.view_w;
    to_patches<decltype(element)>(job, out, first, w, whole ? job.whole_h : job.view_h,
                                  whole ? 1 : job.columns, y,
                                  [&](int64_t at, int c) { return round(row[at] * scale[c] + shift[c]); });
  };
  if (out.element == Element::f32) put(float(), [](float x) { return x; });
  if (out.element == Element::bf16) put(uint16_t(), to_bf16);
  if (out.element == Element::f16) put(uint16_t(), to_f16);
}

}  // namespace mmkernels
