// Arguments of this room's CPU kernels: plain data, shared by the binding and the torch-free kernels.
#pragma once

#include "../common/dtype.h"

namespace mmkernels {

struct Row {
  void* p;
  Dtype dtype;
};

}  // namespace mmkernels
