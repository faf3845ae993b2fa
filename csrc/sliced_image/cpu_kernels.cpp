// Rows of embeddings copied from one dtype to another, and added up. Torch-free; compiled once per
// instruction set.
#include "../common/rows.h"
#include "params.h"

namespace mmkernels {
namespace MMKERNELS_ISA {

// to[i] = from[i] for i < n, by way of `scratch`, which holds n floats, padded to whole vectors.
void convert_row(Row from, Row to, int64_t n, float* scratch) {
  widen(from.dtype, from.p, n, 1.f, scratch, (n + W - 1) / W * W);
  narrow(to.dtype, scratch, n, 1.f, to.p);
}

// sum[i] += from[i], or = for the `first`; `scratch` as above.
void add_row(Row from, int64_t n, bool first, float* sum, float* scratch) {
  const int64_t padded = (n + W - 1) / W * W;
  if (first) {
    widen(from.dtype, from.p, n, 1.f, sum, padded);
    return;
  }
  widen(from.dtype, from.p, n, 1.f, scratch, padded);
  for (int64_t i = 0; i < padded; i += W) store(sum + i, load(sum + i) + load(scratch + i));
}

void write_row(const float* sum, Row to, int64_t n) { narrow(to.dtype, sum, n, 1.f, to.p); }

}  // namespace MMKERNELS_ISA
}  // namespace mmkernels
