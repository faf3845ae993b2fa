// Arguments of this room's CPU kernel: plain data, shared by the binding and the torch-free kernel.
// Letters: M rows, N outputs, C channels.
#pragma once

#include "../common/dtype.h"

namespace mmkernels {

struct GroupedRows {
  const void* weight;  // [E, N, C], unit last stride; the other strides in elements
  int64_t group, row;
  int64_t N, C;
  Dtype dtype;     // of weight and x
  const float* x;  // [M, padded_channels], zeros past C; see half_of for the order
  float* out;      // [M, N], unit last stride
  int64_t out_row;
};

// Rows [first, first + rows) of x go through the weights of one group.
struct RowsOfGroup {
  int64_t group, first, rows;
};

static inline int64_t padded_channels(int64_t c) { return ((c + 31) / 32 | 1) * 32; }

}  // namespace mmkernels
