// Binding of this room's CUDA kernels: checks, output tensors, workspace, the current stream.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <tuple>

#include "binding.h"
#include "params.h"

namespace mmkernels {
namespace {

void check_sizes(int64_t experts, int64_t k) {
  STD_TORCH_CHECK(1 <= k && k <= experts && k <= kMostRoutes && experts <= kMostExperts, "k: got ", k, " of ",
                  experts, " experts, expected at most ", kMostRoutes, " of ", kMostExperts);
}

void* stream_of(const Tensor& x) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

using Routed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// weights, experts, order, inverse, counts, chosen, aux_loss, z_loss: see reference.py.
Routed choose(const Tensor& logits, const std::optional<Tensor>& noise, const std::optional<Tensor>& mask,
              int64_t k, int64_t capacity, bool choices, bool whole, int64_t drop, int64_t normalize,
              int64_t balance) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits: expected [T, E]");
  check_sizes(logits.size(1), k);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const Tensor rows = unit_rows(logits);
  MoeRoute p{};
  p.logits = rows.data_ptr(), p.dtype = dtype_of(logits, "logits"), p.stride = rows.stride(0);
  p.T = rows.size(0), p.E = rows.size(1), p.K = k;
  p.rules = {capacity, choices, whole, Drop(drop), Normalize(normalize), Balance(balance)};
  STD_TORCH_CHECK(capacity < 0 || drop == kByPosition || (drop == kByNoise && !noise),
                  "drop: the best routes are chosen by a sort, which this kernel has not");
  if (noise && drop != kByNoise) {
    STD_TORCH_CHECK(noise->dim() == 2 && noise->size(0) == p.T && noise->size(1) == p.E &&
                        noise->is_contiguous() && noise->scalar_type() == ScalarType::Float,
                    "noise: expected contiguous float32 [T, E]");
    p.noise = data<const float>(*noise);
  }
  p.mask = mask_of(mask, p.T);
  Tensor weights = make(logits, {p.T, k}, ScalarType::Float),
         experts = make(logits, {p.T, k}, ScalarType::Int);
  Tensor order = make(logits, {p.T * k}, ScalarType::Int), inverse = make(logits, {p.T * k}, ScalarType::Int);
  Tensor counts = make(logits, {p.E}, ScalarType::Int), chosen = make(logits, {p.E}, ScalarType::Int);
  Tensor aux = make(logits, {}, ScalarType::Float), z = make(logits, {}, ScalarType::Float);
  p.weights = data<float>(weights), p.experts = data<int32_t>(experts);
  p.order = data<int32_t>(order), p.inverse = data<int32_t>(inverse);
  p.counts = data<int32_t>(counts), p.chosen = data<int32_t>(chosen);
  p.aux_loss = data<float>(aux), p.z_loss = data<float>(z);
  MoeWorkspace w{};
  w.tiles = (p.T + kTile - 1) / kTile;
  Tensor ints = make(logits, {(choices ? k : 1) * w.tiles * p.E + p.E}, ScalarType::Int);
  Tensor sums = make(logits, {w.tiles * (p.E + 1)}, ScalarType::Float);
  w.first = data<int32_t>(ints), w.slabs = w.first + p.E;
  w.tile_share = data<float>(sums), w.tile_square = w.tile_share + w.tiles * p.E;
  STD_CUDA_CHECK(static_cast<cudaError_t>(moe_choose_cuda(p, w, stream_of(logits))));
  return {weights, experts, order, inverse, counts, chosen, aux, z};
}

Tensor choose_backward(const Tensor& dweights, const Tensor& daux, const Tensor& dz, const Tensor& logits,
                       const std::optional<Tensor>& mask, const Tensor& experts, const Tensor& inverse,
                       bool whole, int64_t normalize, int64_t balance) {
  check_sizes(logits.size(1), experts.size(1));
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const Tensor rows = unit_rows(logits);
  MoeRouteBackward p{};
  p.logits = rows.data_ptr(), p.dtype = dtype_of(logits, "logits"), p.stride = rows.stride(0);
  p.T = rows.size(0), p.E = rows.size(1), p.K = experts.size(1);
  p.rules = {-1, false, whole, kByPosition, Normalize(normalize), Balance(balance)};
  p.mask = mask_of(mask, p.T);
  p.experts = data<const int32_t>(experts), p.inverse = data<const int32_t>(inverse);
  p.dweights = data<const float>(dweights), p.daux = data<const float>(daux), p.dz = data<const float>(dz);
  Tensor dlogits = make(logits, {p.T, p.E}, logits.scalar_type());
  p.dlogits = dlogits.data_ptr();
  Tensor workspace = make(logits, {p.E + 1}, ScalarType::Float);
  float* share = data<float>(workspace);
  STD_CUDA_CHECK(
      static_cast<cudaError_t>(moe_choose_backward_cuda(p, share, share + p.E, stream_of(logits))));
  return dlogits;
}

}  // namespace
}  // namespace mmkernels

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CUDA, m) {
  m.impl("moe_choose__cuda", TORCH_BOX(&mmkernels::choose));
  m.impl("moe_choose_backward__cuda", TORCH_BOX(&mmkernels::choose_backward));
}
