// Weights of a separable resize. Torch-free, for front_end.cpp alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "resize.h"

namespace mmkernels {

enum class Filter : int { bilinear, bicubic };

// The weights of one axis, and what owns them.
class Axis {
 public:
  // Pillow's: the filter is widened where the axis shrinks; torch's antialias is the same.
  static Axis widened(int64_t in, int64_t out, Filter filter) {
    const double scale = static_cast<double>(in) / out, wide = std::max(scale, 1.0);
    const double support = (filter == Filter::bicubic ? 2.0 : 1.0) * wide, inverse = 1.0 / wide;
    Axis axis(out, static_cast<int>(std::ceil(support)) * 2 + 1);
    std::vector<double> k(4 * axis.groups_);
    for (int64_t i = 0; i < out; ++i) {
      const double centre = (i + 0.5) * scale;
      const int64_t low = std::max<int64_t>(static_cast<int64_t>(centre - support + 0.5), 0);
      const int64_t high = std::min<int64_t>(static_cast<int64_t>(centre + support + 0.5), in);
      double total = 0;
      for (int64_t x = low; x < high; ++x) {
        k[x - low] = value(filter, (x - centre + 0.5) * inverse);
        total += k[x - low];
      }
      for (int64_t x = 0; x < high - low; ++x) k[x] = total != 0 ? k[x] / total : k[x];
      axis.set(i, low, high - low, k.data());
    }
    return axis;
  }

  // torch's bicubic without antialias: four taps, a = -0.75, those outside stand for the border.
  static Axis four(int64_t in, int64_t out) {
    Axis axis(out, 4);
    const double scale = static_cast<double>(in) / out;
    for (int64_t i = 0; i < out; ++i) {
      const double from = (i + 0.5) * scale - 0.5, t = from - std::floor(from);
      const int64_t start = static_cast<int64_t>(std::floor(from)) - 1;
      const int64_t low = std::min(std::max<int64_t>(start, 0), in - 1),
                    high = std::min(std::max<int64_t>(start + 3, 0), in - 1);
      double k[4] = {0, 0, 0, 0};
      for (int tap = 0; tap < 4; ++tap) {
        const int64_t x = std::min(std::max<int64_t>(start + tap, 0), in - 1);
        k[x - low] += cubic(std::fabs(tap - 1 - t), -0.75);
      }
      axis.set(i, low, high - low + 1, k);
    }
    return axis;
  }

  Taps taps() const { return {first_.data(), count_.data(), fixed_.data(), real_.data(), groups_}; }
  int64_t first(int64_t i) const { return first_[i]; }
  int64_t end(int64_t i) const { return first_[i] + count_[i]; }
  int64_t reach() const { return 4 * groups_; }

 private:
  Axis(int64_t out, int taps)
      : groups_((taps + 3) / 4),
        first_(out),
        count_(out),
        fixed_(out * groups_ * 8),
        real_(out * groups_ * 4) {}

  static double cubic(double x, double a) {
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
  }
  static double value(Filter filter, double x) {
    x = std::fabs(x);
    return filter == Filter::bicubic ? cubic(x, -0.5) : x < 1 ? 1 - x : 0;
  }

  void set(int64_t i, int64_t first, int64_t count, const double* k) {
    first_[i] = static_cast<int32_t>(first), count_[i] = static_cast<int32_t>(count);
    for (int64_t tap = 0; tap < count; ++tap) {
      const double scaled = k[tap] * (1 << 22);
      const int32_t fixed = static_cast<int32_t>(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
      int16_t* group = fixed_.data() + (i * groups_ + tap / 4) * 8;
      group[tap % 4] = static_cast<int16_t>(fixed & 0x7fff);
      group[4 + tap % 4] = static_cast<int16_t>(fixed >> 15);
      real_[i * groups_ * 4 + tap] = static_cast<float>(k[tap]);
    }
  }

  int groups_;
  std::vector<int32_t> first_, count_;
  std::vector<int16_t> fixed_;
  std::vector<float> real_;
};

}  // namespace mmkernels
