// Binding of this room's CUDA kernels: checks, output tensors, the current stream.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <tuple>

#include "params.h"

namespace mmkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();

std::tuple<Tensor, Tensor, Tensor> media_intervals(const Tensor& media_locations,  // [B, T] bool
                                                   int64_t latents, int64_t num_media, bool all_previous,
                                                   bool use_cached_media, bool attend_previous,
                                                   int64_t rows) {
  STD_TORCH_CHECK(media_locations.dim() == 2, "media_locations: got rank ", media_locations.dim(),
                  ", expected [B, T]");
  STD_TORCH_CHECK(media_locations.scalar_type() == ScalarType::Bool, "media_locations: expected bool");
  const int64_t batch = media_locations.size(0), tokens = media_locations.size(1);
  STD_TORCH_CHECK(use_cached_media || rows == tokens, "rows: got ", rows, ", expected ", tokens);
  STD_TORCH_CHECK(latents >= 0 && num_media >= 0 && batch * num_media * latents <= kInt32Max,
                  "media keys: got ", batch, " x ", num_media, " x ", latents, ", expected at most 2^31 - 1");
  const Tensor locations =
      media_locations.stride(1) == 1 ? media_locations : torch::stable::contiguous(media_locations);
  const torch::stable::accelerator::DeviceGuard guard(locations.get_device_index());
  const int64_t size[] = {batch * rows};
  Tensor lo = torch::stable::new_empty(locations, size, ScalarType::Int);
  Tensor hi = torch::stable::new_empty(locations, size, ScalarType::Int);
  Tensor uniform = torch::stable::new_empty(locations, size, ScalarType::Bool);

  MediaIntervals p{};
  p.media_locations = locations.const_data_ptr<bool>();
  p.lo = lo.mutable_data_ptr<int32_t>();
  p.hi = hi.mutable_data_ptr<int32_t>();
  p.uniform = uniform.mutable_data_ptr<bool>();
  p.batch = batch;
  p.tokens = tokens;
  p.stride = locations.stride(0);
  p.rows = rows;
  p.latents = static_cast<int32_t>(latents);
  p.num_media = static_cast<int32_t>(num_media);
  p.all_previous = all_previous;
  p.use_cached_media = use_cached_media;
  p.attend_previous = attend_previous;
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(locations.get_device_index(), &stream));
  STD_CUDA_CHECK(static_cast<cudaError_t>(media_intervals_cuda(p, stream)));
  return {lo, hi, uniform};
}

}  // namespace
}  // namespace mmkernels

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CUDA, m) {
  m.impl("media_intervals__cuda", TORCH_BOX(&mmkernels::media_intervals));
}
