// The router on the GPU: top-k, histogram, scan and stable places in one cooperative launch.
//
// Plan. A tile is 64 tokens; blocks take tiles in turn. Phase 1: a warp owns a token, its experts spread over
// the lanes' registers; K rounds of a warp-wide search find the largest number and the lowest id that holds
// it; the tile's routes are counted by expert. Phase 2, after a barrier over the grid: a thread owns an
// expert and turns its counts, tile after tile, into first slots. Phase 3, after another: every block knows
// where experts' rows start, a route's slot is its tile's first slot plus its rank in the tile, and weights
// are renormalised over what is kept. Bytes: logits once, ids and weights twice, two numbers for each (tile,
// expert). Sums of floats have one order.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "route.h"

namespace mmkernels {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;

__device__ float read(const void* p, Dtype d, int64_t i) {
  if (d == Dtype::f32) return static_cast<const float*>(p)[i];
  if (d == Dtype::bf16) return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[i]);
  return __half2float(static_cast<const __half*>(p)[i]);
}
__device__ void write(void* p, Dtype d, int64_t i, float x) {
  if (d == Dtype::f32)
    static_cast<float*>(p)[i] = x;
  else if (d == Dtype::bf16)
    static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16(x);
  else
    static_cast<__half*>(p)[i] = __float2half(x);
}

__device__ float warp_max(float x) {
  for (int d = 16; d > 0; d /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, d));
  return x;
}
__device__ float warp_sum(float x) {
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(kAll, x, d);
  return x;
}

// A token's row over the lanes of a warp: expert i * 32 + lane.
template <int N>
struct Row {
  float logit[N], p[N];
  float lse;
  bool sane;
};

template <int N>
__device__ Row<N> read_row(const void* logits, Dtype d, int64_t at, int64_t E) {
  Row<N> r;
  bool bad = false, number = false;
  float top = -INFINITY, sum = 0.f;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int e = i * 32 + lane;
    r.logit[i] = -INFINITY;
    if (e < E) {
      const float x = read(logits, d, at + e);
      bad = bad || !(x <= kLargest);
      number = number || x >= -kLargest;
      r.logit[i] = finite(x);
    }
    top = fmaxf(top, r.logit[i]);
  }
  top = warp_max(top);
#pragma unroll
  for (int i = 0; i < N; ++i) sum += r.p[i] = expf(r.logit[i] - top);
  sum = warp_sum(sum);
#pragma unroll
  for (int i = 0; i < N; ++i) r.p[i] /= sum;
  r.lse = top + logf(sum);
  r.sane = !__any_sync(kAll, bad) && __any_sync(kAll, number);
  return r;
}

// The lowest expert that holds the largest number, the same in all lanes; it is no choice any more.
template <int N>
__device__ int take_largest(float (&left)[N]) {
  const int lane = threadIdx.x % 32;
  float best = left[0];
  int at = lane;
#pragma unroll
  for (int i = 1; i < N; ++i)
    if (left[i] > best) best = left[i], at = i * 32 + lane;
  for (int d = 16; d > 0; d /= 2) {
    const float other = __shfl_xor_sync(kAll, best, d);
    const int from = __shfl_xor_sync(kAll, at, d);
    if (other > best || (other == best && from < at)) best = other, at = from;
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i * 32 + lane == at) left[i] = -INFINITY;
  return at;
}

template <int N>
__device__ float value_at(const float (&row)[N], int at) {
  const int lane = threadIdx.x % 32;
  float mine = 0.f;
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i * 32 + lane == at) mine = row[i];
  return __shfl_sync(kAll, mine, at % 32);
}

template <int N>
__device__ void choose_token(const MoeRoute& p, int64_t t, const Row<N>& r, int32_t* ids, bool used) {
  const int lane = threadIdx.x % 32;
  float left[N];
#pragma unroll
  for (int i = 0; i < N; ++i) left[i] = r.logit[i];
  int first = -1;
  if (p.noise) {
    if (p.rules.choices) first = take_largest<N>(left);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const int e = i * 32 + lane;
      left[i] = e < p.E && e != first ? finite(r.logit[i] + p.noise[t * p.E + e]) : -INFINITY;
    }
  }
  for (int64_t j = 0; j < p.K; ++j) {
    const int at = j == 0 && first >= 0 ? first : take_largest<N>(left);
    const float probability = value_at<N>(r.p, at);
    if (lane == 0) {
      p.experts[t * p.K + j] = at;
      p.weights[t * p.K + j] = probability;
      ids[j] = used ? at : -1;
    }
  }
}

// Phase 1 of one tile. `share` holds a row of E for each warp.
template <int N>
__device__ void choose_tile(const MoeRoute& p, const MoeWorkspace& w, int64_t tile, int32_t* ids,
                            float* share, float* square) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t start = tile * kTile, size = min(kTile, p.T - start);
  float sum[N] = {}, squares = 0.f;
  for (int64_t i = warp; i < size; i += kWarps) {
    const int64_t t = start + i;
    const bool used = !p.mask || p.mask[t];
    const Row<N> r = read_row<N>(p.logits, p.dtype, t * p.stride, p.E);
    choose_token<N>(p, t, r, ids + i * p.K, used);
#pragma unroll
    for (int n = 0; n < N; ++n) sum[n] += used || p.rules.whole ? r.p[n] : 0.f;
    squares += used && r.sane ? r.lse * r.lse : 0.f;
  }
#pragma unroll
  for (int n = 0; n < N; ++n)
    if (n * 32 + lane < p.E) share[warp * p.E + n * 32 + lane] = sum[n];
  if (lane == 0) square[warp] = squares;
  const int64_t ranks = p.rules.choices ? p.K : 1;
  for (int64_t i = threadIdx.x; i < ranks * p.E; i += kThreads)
    w.slabs[(i / p.E * w.tiles + tile) * p.E + i % p.E] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < size * p.K; i += kThreads)  // counts: whatever the order, one result
    if (ids[i] >= 0) atomicAdd(&w.slabs[slab_of(tile, i, w.tiles, p.K, p.rules.choices) * p.E + ids[i]], 1);
  for (int64_t e = threadIdx.x; e < p.E; e += kThreads) {
    float total = 0.f;
    for (int n = 0; n < kWarps; ++n) total += share[n * p.E + e];
    w.tile_share[tile * p.E + e] = total;
  }
  if (threadIdx.x == 0) {
    float total = 0.f;
    for (int n = 0; n < kWarps; ++n) total += square[n];
    w.tile_square[tile] = total;
  }
  __syncthreads();  // ids and sums are written again for the next tile
}

// Phase 2 of one expert.
__device__ void scan_expert(const MoeRoute& p, const MoeWorkspace& w, int64_t e) {
  const int64_t ranks = p.rules.choices ? p.K : 1;
  const int32_t routes = scan_slabs(w.slabs, ranks * w.tiles, p.E, e);
  p.chosen[e] = routes;
  p.counts[e] = kept_of(routes, p.rules.capacity);
  w.first[e] = p.rules.choices && w.tiles && p.K > 1 ? w.slabs[w.tiles * p.E + e] : routes;
  float total = 0.f;
  for (int64_t tile = 0; tile < w.tiles; ++tile) total += w.tile_share[tile * p.E + e];
  if (w.tiles) w.tile_share[e] = total;
}

// start[e] = the rows of all experts before e; returns how many there are. One warp after another's total.
__device__ int32_t starts_of(const MoeRoute& p, int32_t* start) {
  __shared__ int32_t total;
  if (threadIdx.x < 32) {
    int32_t running = 0;
    for (int64_t e0 = 0; e0 < p.E; e0 += 32) {
      const int64_t e = e0 + threadIdx.x;
      int32_t own = e < p.E ? p.counts[e] : 0, sum = own;
      for (int d = 1; d < 32; d *= 2) {
        const int32_t before = __shfl_up_sync(kAll, sum, d);
        sum += threadIdx.x >= d ? before : 0;
      }
      if (e < p.E) start[e] = running + sum - own;
      running += __shfl_sync(kAll, sum, 31);
    }
    if (threadIdx.x == 0) total = running;
  }
  __syncthreads();
  return total;
}

// Phase 3 of one tile.
__device__ void place_tile(const MoeRoute& p, const MoeWorkspace& w, int64_t tile, const int32_t* start,
                           int32_t* ids) {
  const int64_t first = tile * kTile, size = min(kTile, p.T - first) * p.K;
  for (int64_t i = threadIdx.x; i < size; i += kThreads)
    ids[i] = !p.mask || p.mask[first + i / p.K] ? p.experts[first * p.K + i] : -1;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    const int64_t route = first * p.K + i;
    const int32_t e = ids[i];
    int32_t place = -1;
    if (e >= 0) {
      const int64_t slab = slab_of(tile, i, w.tiles, p.K, p.rules.choices);
      const int32_t slot = w.slabs[slab * p.E + e] + rank_in_tile(ids, i, p.K, p.rules.choices);
      if (slot < p.counts[e]) place = start[e] + slot;
    }
    p.inverse[route] = place;
    if (place >= 0) p.order[place] = static_cast<int32_t>(route);
  }
  __syncthreads();  // a block's own writes to inverse are seen below
  for (int64_t i = threadIdx.x; i < size / p.K; i += kThreads)
    normalize(p.rules.normalize, p.inverse + (first + i) * p.K, p.K, p.weights + (first + i) * p.K);
  __syncthreads();
}

// Both losses, by one warp.
__device__ void losses(const MoeRoute& p, const MoeWorkspace& w) {
  const int lane = threadIdx.x;
  int32_t used = 0;
  for (int64_t e = lane; e < p.E; e += 32) used += p.chosen[e];
  for (int d = 16; d > 0; d /= 2) used += __shfl_xor_sync(kAll, used, d);
  const float tokens = fmaxf(1.f, static_cast<float>(p.rules.whole ? p.T : used / p.K));
  float aux = 0.f, square = 0.f;
  for (int64_t e = lane; w.tiles && e < p.E; e += 32) {
    const int64_t routes = p.rules.balance == kFirstChoices ? w.first[e] : p.chosen[e];
    aux += share_of(p.rules, p.E, p.K, routes, tokens) / tokens * w.tile_share[e];
  }
  for (int64_t tile = lane; tile < w.tiles; tile += 32) square += w.tile_square[tile];
  aux = warp_sum(aux), square = warp_sum(square);
  if (lane == 0) *p.aux_loss = aux, *p.z_loss = square / tokens;
}

// Blocks of a multiprocessor, so that registers suffice.
constexpr int resident(int n) { return n <= 4 ? 2 : 1; }

template <int N>
__global__ void __launch_bounds__(kThreads, resident(N)) choose_kernel(MoeRoute p, MoeWorkspace w) {
  extern __shared__ float shared[];  // E for each warp, then E starts
  __shared__ int32_t ids[kTile * kMostRoutes];
  __shared__ float square[kWarps];
  cg::grid_group grid = cg::this_grid();
  for (int64_t tile = blockIdx.x; tile < w.tiles; tile += gridDim.x)
    choose_tile<N>(p, w, tile, ids, shared, square);
  grid.sync();
  const int64_t id = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int64_t threads = gridDim.x * static_cast<int64_t>(kThreads);
  for (int64_t e = id; e < p.E; e += threads) scan_expert(p, w, e);
  grid.sync();
  auto* start = reinterpret_cast<int32_t*>(shared);
  const int32_t total = starts_of(p, start);
  for (int64_t tile = blockIdx.x; tile < w.tiles; tile += gridDim.x) place_tile(p, w, tile, start, ids);
  for (int64_t i = total + id; i < p.T * p.K; i += threads) p.order[i] = -1;
  if (blockIdx.x == 0 && threadIdx.x < 32) losses(p, w);
}

// share[e]: what p[t, e] of a counted token weighs in the auxiliary loss; tokens: how many the losses average
// over.
__global__ void __launch_bounds__(kThreads) share_kernel(MoeRouteBackward p, float* share, float* tokens) {
  __shared__ int32_t routes[kMostExperts], used;
  for (int64_t e = threadIdx.x; e < p.E; e += kThreads) routes[e] = 0;
  if (threadIdx.x == 0) used = 0;
  __syncthreads();
  const int64_t choices = p.rules.balance == kFirstChoices ? 1 : p.K;
  for (int64_t t = threadIdx.x; t < p.T; t += kThreads) {
    if (p.mask && !p.mask[t]) continue;
    atomicAdd(&used, 1);
    for (int64_t j = 0; j < choices; ++j) {
      const int32_t e = p.experts[t * p.K + j];
      if (e >= 0 && e < p.E) atomicAdd(&routes[e], 1);
    }
  }
  __syncthreads();
  const float count = fmaxf(1.f, static_cast<float>(p.rules.whole ? p.T : used));
  for (int64_t e = threadIdx.x; e < p.E; e += kThreads)
    share[e] = share_of(p.rules, p.E, p.K, routes[e], count) / count * *p.daux;
  if (threadIdx.x == 0) *tokens = count;
}

template <int N>
__global__ void __launch_bounds__(kThreads, resident(N))
    backward_kernel(MoeRouteBackward p, const float* share, const float* tokens) {
  __shared__ float chosen[kWarps][kMostRoutes];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t t = blockIdx.x * static_cast<int64_t>(kWarps) + warp;
  if (t >= p.T) return;
  const Row<N> r = read_row<N>(p.logits, p.dtype, t * p.stride, p.E);
  const bool used = !p.mask || p.mask[t];
  const int32_t *experts = p.experts + t * p.K, *inverse = p.inverse + t * p.K;
  for (int64_t j = 0; j < p.K; ++j) {
    const float probability = value_at<N>(r.p, experts[j]);
    if (lane == 0) chosen[warp][j] = probability;
  }
  __syncwarp();
  float g[N], dot = 0.f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int e = i * 32 + lane;
    g[i] = e < p.E && (used || p.rules.whole) ? share[e] : 0.f;
  }
  for (int64_t j = 0; j < p.K; ++j) {
    const float d = chosen_gradient(p.rules.normalize, chosen[warp], inverse, p.dweights + t * p.K, p.K, j);
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i * 32 + lane == experts[j]) g[i] += d;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) dot += g[i] * r.p[i];
  const float less = warp_sum(dot) - (used ? 2.f * *p.dz * r.lse / *tokens : 0.f);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i * 32 + lane < p.E)
      write(p.dlogits, p.dtype, t * p.E + i * 32 + lane, r.sane ? r.p[i] * (g[i] - less) : 0.f);
}

template <int N>
int launch(const MoeRoute& p, const MoeWorkspace& w, cudaStream_t stream) {
  int device = 0, units = 0, blocks = 0;
  const size_t bytes = kWarps * p.E * sizeof(float);
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&units, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, choose_kernel<N>, kThreads, bytes);
  if (error != cudaSuccess) return error;
  const int64_t most = static_cast<int64_t>(units) * blocks, wanted = w.tiles > 0 ? w.tiles : 1;
  MoeRoute params = p;
  MoeWorkspace workspace = w;
  void* arguments[] = {&params, &workspace};
  return cudaLaunchCooperativeKernel(choose_kernel<N>,
                                     dim3(static_cast<unsigned>(wanted < most ? wanted : most)),
                                     dim3(kThreads), arguments, bytes, stream);
}

template <int N>
int launch_backward(const MoeRouteBackward& p, float* share, float* tokens, cudaStream_t stream) {
  share_kernel<<<1, kThreads, 0, stream>>>(p, share, tokens);
  const auto blocks = static_cast<unsigned>((p.T + kWarps - 1) / kWarps);
  backward_kernel<N><<<blocks, kThreads, 0, stream>>>(p, share, tokens);
  return cudaGetLastError();
}

}  // namespace

int moe_choose_cuda(const MoeRoute& p, const MoeWorkspace& w, void* stream) {
  auto* s = static_cast<cudaStream_t>(stream);
  if (p.E <= 32) return launch<1>(p, w, s);
  if (p.E <= 128) return launch<4>(p, w, s);
  return p.E <= 512 ? launch<16>(p, w, s) : launch<32>(p, w, s);
}

int moe_choose_backward_cuda(const MoeRouteBackward& p, float* share, float* tokens, void* stream) {
  auto* s = static_cast<cudaStream_t>(stream);
  if (p.T == 0) return cudaSuccess;
  if (p.E <= 32) return launch_backward<1>(p, share, tokens, s);
  if (p.E <= 128) return launch_backward<4>(p, share, tokens, s);
  return p.E <= 512 ? launch_backward<16>(p, share, tokens, s) : launch_backward<32>(p, share, tokens, s);
}

}  // namespace mmkernels
