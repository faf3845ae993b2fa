// Rows of pictures made one after another, as a canvas needs them. For front_end.cpp alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../common/isa.h"
#include "front_end.h"
#include "patches.h"
#include "resize.h"
#include "weights.h"

namespace mmkernels {

MMKERNELS_DECLARE(void across(const Across&))
MMKERNELS_DECLARE(void down(const Down&))
MMKERNELS_DECLARE(void real_down(const RealDown&))
MMKERNELS_DECLARE(void real_across(const RealAcross&))

using Bytes = std::vector<uint8_t>;
constexpr int64_t MARGIN = 32;  // what the loops may read or write past a row of ours

// A picture may reach beyond the views: what they do not cover only the view of the whole shows.
inline int64_t canvas_width(const Job& job) {
  return std::max(job.columns * job.view_w, job.left + job.width);
}
inline int64_t canvas_height(const Job& job) { return std::max(job.rows * job.view_h, job.top + job.height); }

// Rows of the resized picture, in order, rounded to bytes after either axis.
class Resized {
 public:
  Resized(const Job& job, const Picture& picture)
      : job_(job),
        picture_(picture),
        wide_(job.x1 - job.x0),
        high_(job.y1 - job.y0),
        across_(Axis::widened(wide_, job.width, Filter(job.filter))),
        down_(Axis::widened(high_, job.height, Filter(job.filter))),
        stride_(3 * (job.down_first ? wide_ : job.width) + MARGIN),
        slots_(job.down_first ? 4 : down_.reach() + 4),
        ring_(slots_ * stride_),
        made_(4, Bytes(3 * job.width + MARGIN)),
        rows_(down_.reach() + 1) {
    const uint8_t* end = picture.pixels + 3 * picture.width * picture.height;
    for (tail_ = high_; tail_ > 0 && end - place(tail_ - 1) < 3 * wide_ + MARGIN;) --tail_;
    for (int64_t y = tail_; y < high_; ++y) {  // the loops may read past these rows: not past the picture
      tails_.emplace_back(3 * wide_ + MARGIN);
      std::memcpy(tails_.back().data(), place(y), 3 * wide_);
    }
  }

  void row(int64_t y, uint8_t* out) { job_.down_first ? down_first(y, out) : across_first(y, out); }

 private:
  const uint8_t* place(int64_t y) const {
    return picture_.pixels + 3 * ((job_.y0 + y) * picture_.width + job_.x0);
  }
  const uint8_t* source(int64_t y) const { return y < tail_ ? place(y) : tails_[y - tail_].data(); }
  uint8_t* slot(int64_t y) { return ring_.data() + y % slots_ * stride_; }

  void across_first(int64_t y, uint8_t* out) {
    next_ = std::max(next_, down_.first(y));
    for (; next_ < down_.end(y); next_ += 4) {  // four rows go across at once
      Across pass{{}, {}, static_cast<int>(job_.width), across_.taps()};
      for (int64_t i = 0; i < 4; ++i) {
        const bool there = next_ + i < high_;
        pass.rows[i] = source(there ? next_ + i : high_ - 1);
        pass.out[i] = there ? slot(next_ + i) : made_[i].data();
      }
      go_across(pass);
    }
    for (int64_t tap = 0; tap < down_.end(y) - down_.first(y); ++tap) rows_[tap] = slot(down_.first(y) + tap);
    go_down(y, out, 3 * job_.width);
  }

  void down_first(int64_t y, uint8_t* out) {
    if (y >= next_ || y < next_ - 4) {
      Across pass{{}, {}, static_cast<int>(job_.width), across_.taps()};
      for (int64_t i = 0; i < 4; ++i) {
        const int64_t at = std::min(y + i, job_.height - 1);
        for (int64_t tap = 0; tap < down_.end(at) - down_.first(at); ++tap)
          rows_[tap] = source(down_.first(at) + tap);
        go_down(at, slot(i), 3 * wide_);
        pass.rows[i] = slot(i);
        pass.out[i] = made_[i].data();
      }
      go_across(pass);
      next_ = y + 4;
    }
    std::memcpy(out, made_[y - (next_ - 4)].data(), 3 * job_.width);
  }

  // An axis that keeps its size has the weights 0, 1, 0.
  void go_across(const Across& pass) {
    if (wide_ != job_.width) return MMKERNELS_CALL(across, pass);
    for (int64_t i = 0; i < 4; ++i) std::memcpy(pass.out[i], pass.rows[i], 3 * wide_);
  }

  void go_down(int64_t y, uint8_t* out, int64_t bytes) {
    const int64_t count = down_.end(y) - down_.first(y);
    const Taps taps = down_.taps();
    rows_[count] = rows_[count - 1];
    const Down pass{rows_.data(), taps.fixed + y * taps.groups * 8, static_cast<int>((count + 1) / 2), out,
                    static_cast<int>(bytes)};
    if (high_ != job_.height) return MMKERNELS_CALL(down, pass);
    std::memcpy(out, rows_[y - down_.first(y)], bytes);
  }

  const Job& job_;
  const Picture& picture_;
  int64_t wide_, high_;
  Axis across_, down_;
  int64_t stride_, slots_, next_ = 0, tail_ = 0;
  Bytes ring_;
  std::vector<Bytes> made_, tails_;
  std::vector<const uint8_t*> rows_;
};

// The whole canvas once more, by four taps of its rows as they come.
class Whole {
 public:
  Whole(const Job& job, const Output& out)
      : job_(job),
        out_(out),
        wide_(3 * canvas_width(job)),
        across_(Axis::four(canvas_width(job), job.whole_w)),
        down_(Axis::four(canvas_height(job), job.whole_h)),
        ring_(4 * wide_),
        row_(wide_),
        made_(3 * job.whole_w) {}

  void push(const uint8_t* row, int64_t y) {
    std::memcpy(ring_.data() + y % 4 * wide_, row, wide_);
    for (; made_rows_ < job_.whole_h && down_.end(made_rows_) <= y + 1; ++made_rows_) {
      const uint8_t* rows[4];
      const int64_t first = down_.first(made_rows_), count = down_.end(made_rows_) - first;
      for (int64_t tap = 0; tap < count; ++tap) rows[tap] = ring_.data() + (first + tap) % 4 * wide_;
      const Taps taps = down_.taps();
      const RealDown pass{rows, taps.real + 4 * made_rows_, static_cast<int>(count), row_.data(),
                          static_cast<int>(wide_)};
      MMKERNELS_CALL(real_down, pass);
      const RealAcross next{row_.data(), made_.data(), static_cast<int>(job_.whole_w), across_.taps()};
      MMKERNELS_CALL(real_across, next);
      put_reals(job_, out_, true, made_.data(), made_rows_);
    }
  }

 private:
  const Job& job_;
  const Output& out_;
  int64_t wide_;
  Axis across_, down_;
  Bytes ring_;
  std::vector<float> row_, made_;
  int64_t made_rows_ = 0;
};

}  // namespace mmkernels
