// What this room's two bindings share: tensors made, read and checked.
#pragma once

#include <initializer_list>
#include <optional>
#include <vector>

#include "../common/binding.h"

namespace mmkernels {

inline Tensor make(const Tensor& like, std::initializer_list<int64_t> size, ScalarType type) {
  const std::vector<int64_t> sizes(size);
  return torch::stable::new_empty(like, sizes, type);
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

inline const bool* mask_of(const std::optional<Tensor>& mask, int64_t tokens) {
  if (!mask) return nullptr;
  STD_TORCH_CHECK(mask->dim() == 1 && mask->size(0) == tokens && mask->scalar_type() == ScalarType::Bool &&
                      mask->is_contiguous(),
                  "mask: expected contiguous bool [T]");
  return data<const bool>(*mask);
}

}  // namespace mmkernels
