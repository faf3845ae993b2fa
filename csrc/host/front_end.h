// From bytes of pictures to packed rows of patches. Torch-free, Python-free.
#pragma once

#include <cstdint>
#include <vector>

namespace mmkernels {

// One resize of one picture, and where its pixels go: onto a canvas of columns x rows views, each cut into
// patches. The order of the fields is that of the columns of the table that Python hands over.
struct Job {
  int64_t image, x0, y0, x1, y1;          // the part of the picture that is resized
  int64_t width, height, filter, real;    // its new size; 0 bilinear, 1 bicubic; not rounded to bytes
  int64_t left, top, fill;                // where it lies on the canvas, and the byte around it
  int64_t columns, rows, view_w, view_h;  // the canvas
  int64_t patch, last, first;             // order (y, x, c), not (c, y, x); first row of the output
  int64_t whole_w, whole_h, whole_first;  // one more view of the whole canvas by four taps; 0: none
  int64_t down_first;                     // which axis is resized first
};
constexpr int64_t JOB_FIELDS = sizeof(Job) / sizeof(int64_t);

struct Picture {
  const uint8_t* pixels;  // [height, width, 3]
  int64_t width, height;
};

enum class Element : int { f32, bf16, f16 };

struct Output {
  void* rows;  // [count, width] of `element`
  int64_t count;
  Element element;
  const void* table;            // [3, 256] of `element`: what a byte becomes in each channel
  const double *scale, *shift;  // [3]: what a value that is no whole byte becomes
};

// "" or one sentence about the first job that does not fit its picture or the output.
const char* why_not(const std::vector<Job>& jobs, const std::vector<Picture>& pictures, const Output& out);

void front_end(const std::vector<Job>& jobs, const std::vector<Picture>& pictures, const Output& out,
               int threads);

}  // namespace mmkernels
