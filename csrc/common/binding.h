// For the bindings only: tensors to plain pointers, and tasks over threads. Baseline instruction
// set.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>

#include "dtype.h"

namespace mmkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& x, const char* name) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
                  ": expected float32, bfloat16 or float16");
  return type == ScalarType::Float ? Dtype::f32 : type == ScalarType::BFloat16 ? Dtype::bf16 : Dtype::f16;
}

// Kernels read rows of unit stride: whatever else comes (a gradient expanded from a scalar) is copied.
inline Tensor unit_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

inline Tensor floats(const Tensor& like, int64_t n) {
  const int64_t size[] = {n};
  return torch::stable::new_empty(like, size, ScalarType::Float);
}

// The number of workers worth starting for `tasks` tasks of `flops` each: a thread costs as much as some
// 100,000 of them.
inline int64_t workers(int64_t tasks, double flops) {
  const double useful = tasks * flops / 1e5 + 1;
  int64_t n = torch::stable::get_num_threads();
  if (n > tasks) n = tasks;
  return n > useful ? static_cast<int64_t>(useful) : n;
}

// f(task, worker) for every task, each worker taking the next task as soon as it is free.
template <class F>
void run_tasks(int64_t tasks, int64_t workers, const F& f) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t task = next++; task < tasks; task = next++) f(task, worker);
  });
}

}  // namespace mmkernels
