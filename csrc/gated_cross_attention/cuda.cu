// media_intervals: which run of latents each text row sees, from the positions of the media tokens.
//
// Plan. One block owns one batch row and is the only reader and writer of it: one byte per token in (twice,
// where the total is needed first), nine bytes per text row out, one launch, no workspace. The row is walked
// in chunks of one token per thread; inside a chunk the media time is an inclusive scan (ballot and popcount
// in a warp, then over the warps' sums in shared memory), between chunks a running total that every thread
// holds.
#include <cuda_runtime.h>

#include "params.h"

namespace mmkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Inclusive count of `is_media` over the block's threads up to this one; `sum` is the count over all of them.
__device__ int32_t block_scan(bool is_media, int32_t& sum) {
  __shared__ int32_t warp_sum[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned votes = __ballot_sync(kAllLanes, is_media);
  if (lane == 0) warp_sum[warp] = __popc(votes);
  __syncthreads();
  int32_t before = 0;
  sum = 0;
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp ? warp_sum[w] : 0;
    sum += warp_sum[w];
  }
  __syncthreads();  // warp_sum is written again by the next chunk
  return before + __popc(votes & (kAllLanes >> (31 - lane)));
}

__device__ int32_t count_media(const bool* row, int64_t tokens) {
  int32_t total = 0;
  for (int64_t start = 0; start < tokens; start += kThreads) {
    const int64_t t = start + threadIdx.x;
    total += __syncthreads_count(t < tokens && row[t]);
  }
  return total;
}

// The interval of a row whose media time is `time` (0: before any medium), in keys of its own batch row.
__device__ void write_interval(const MediaIntervals& p, int64_t at, int32_t base, int32_t time) {
  const bool uniform = p.all_previous ? time == 0 : time > p.num_media;
  int32_t lo = 0, hi = p.num_media * p.latents;
  if (!uniform) {
    lo = p.all_previous ? 0 : max(time - 1, 0) * p.latents;
    hi = min(time, p.num_media) * p.latents;
  }
  p.lo[at] = base + lo;
  p.hi[at] = base + hi;
  p.uniform[at] = uniform;
}

__global__ void __launch_bounds__(kThreads) media_intervals_kernel(MediaIntervals p) {
  const int64_t b = blockIdx.x;
  const bool* row = p.media_locations + b * p.stride;
  const int32_t base = static_cast<int32_t>(b) * p.num_media * p.latents;
  // Otter's next-medium rule, and the cached rule, need the row's total before its first text row.
  const bool needs_total = p.use_cached_media || !p.attend_previous;
  const int32_t total = needs_total ? count_media(row, p.tokens) : 0;
  int32_t seen = 0;
  for (int64_t start = 0; start < p.rows; start += kThreads) {
    const int64_t t = start + threadIdx.x;
    int32_t time = total, chunk = 0;
    if (!p.use_cached_media) {
      const bool is_media = t < p.tokens && row[t];
      time = seen + block_scan(is_media, chunk);
      if (!p.attend_previous) time += is_media ? 0 : 1;
    }
    seen += chunk;
    if (!p.attend_previous && time > total) time = 0;
    if (t < p.rows) write_interval(p, b * p.rows + t, base, time);
  }
}

}  // namespace

int media_intervals_cuda(const MediaIntervals& p, void* stream) {
  if (p.batch * p.rows == 0) return cudaSuccess;
  media_intervals_kernel<<<static_cast<unsigned>(p.batch), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      p);
  return cudaGetLastError();
}

}  // namespace mmkernels
