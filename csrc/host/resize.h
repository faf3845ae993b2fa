// What the loops of resize_kernels.cpp take: rows of bytes, RGB by RGB, and the weights of one axis.
#pragma once

#include <cstdint>

namespace mmkernels {

// Output i is made of inputs first[i] .. first[i] + count[i]. `fixed` holds for every output `groups` groups
// of four weights k of 22 fractional bits, split as k = 2^15 high + low: four lows (0 .. 2^15 - 1), then four
// highs. `real` holds 4 * groups floats for every output. Weights past the count are 0.
struct Taps {
  const int32_t* first;
  const int32_t* count;
  const int16_t* fixed;
  const float* real;
  int groups;
};

// Four rows at once. Each input row may be read 13 bytes past its last tap, each output row is written one
// byte past its end.
struct Across {
  const uint8_t* rows[4];
  uint8_t* out[4];
  int width;  // of the output, in pixels
  Taps taps;
};

struct Down {
  const uint8_t* const* rows;  // `pairs` times two, the last one repeated where it is odd
  const int16_t* fixed;
  int pairs;
  uint8_t* out;  // exactly `bytes` are written; input rows may be read up to a multiple of 16
  int bytes;
};

struct RealDown {
  const uint8_t* const* rows;
  const float* weights;
  int count;
  float* out;
  int bytes;
};

struct RealAcross {
  const float* row;
  float* out;
  int width;
  Taps taps;
};

}  // namespace mmkernels
