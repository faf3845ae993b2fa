// Arguments of this room's compiled kernels: plain data, shared by the binding and the torch-free kernels.
#pragma once

#include <cstdint>

namespace mmkernels {

struct MediaIntervals {
  const bool* media_locations;  // [B, T], rows `stride` elements apart
  int32_t* lo;                  // [B, rows]
  int32_t* hi;                  // [B, rows]
  bool* uniform;                // [B, rows]
  int64_t batch, tokens, stride, rows;
  int32_t latents, num_media;
  bool all_previous, use_cached_media, attend_previous;
};

// Launches on `stream` and returns the cudaError_t of the launch.
int media_intervals_cuda(const MediaIntervals& p, void* stream);

}  // namespace mmkernels
