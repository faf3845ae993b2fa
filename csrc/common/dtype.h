// Element types of tensors as kernels see them. Torch-free.
#pragma once

#include <cstdint>

namespace mmkernels {

enum class Dtype : int { f32, bf16, f16 };

static inline int64_t bytes_of(Dtype d) { return d == Dtype::f32 ? 4 : 2; }
static inline void* element(const void* p, Dtype d, int64_t index) {
  return const_cast<char*>(static_cast<const char*>(p)) + index * bytes_of(d);
}

}  // namespace mmkernels
