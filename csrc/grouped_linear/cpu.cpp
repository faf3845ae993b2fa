// Binding of the CPU kernel for groups of few rows. Stable ABI, baseline instruction set.
#include <optional>
#include <vector>

#include "../common/binding.h"
#include "../common/isa.h"
#include "params.h"

namespace mmkernels {

MMKERNELS_DECLARE(void multiply(const GroupedRows& p, const RowsOfGroup& rows, int64_t n0, int64_t n1))
MMKERNELS_DECLARE(void widen_row(const GroupedRows& p, const void* row, float* x))

namespace {

constexpr int64_t kBlockBytes = 192 << 10;  // of weights a task: with the rows it fits in L2

const int32_t* ints(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 1 && x.scalar_type() == ScalarType::Int && (x.size(0) < 2 || x.stride(0) == 1),
                  name, ": expected a contiguous int32 vector");
  return static_cast<const int32_t*>(x.data_ptr());
}

// The parts of the groups that lie in rows [begin, end), counted from `begin`.
std::vector<RowsOfGroup> parts_of(const int32_t* counts, int64_t groups, int64_t begin, int64_t end) {
  std::vector<RowsOfGroup> parts;
  int64_t at = 0;
  for (int64_t e = 0; e < groups && at < end; ++e) {
    const int64_t stop = at + (counts[e] > 0 ? counts[e] : 0);
    const int64_t from = at > begin ? at : begin, to = stop < end ? stop : end;
    if (to > from) parts.push_back({e, from - begin, to - from});
    at = stop;
  }
  return parts;
}

// out[i - begin] = x[index[i]] weight[group of i]^T in float for the rows i in [begin, end); a row without a
// place in x counts as 0.
void grouped_rows(const Tensor& x, const Tensor& weight, const Tensor& counts,
                  const std::optional<Tensor>& index, int64_t begin, int64_t end, Tensor& out) {
  const int64_t m = end - begin;
  STD_TORCH_CHECK(
      x.dim() == 2 && weight.dim() == 3 && x.size(1) == weight.size(2) && counts.size(0) == weight.size(0),
      "x, weight, counts: expected [R, C], [E, N, C], [E]");
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == m && out.size(1) == weight.size(1) &&
                      out.scalar_type() == ScalarType::Float && (out.size(1) < 2 || out.stride(1) == 1),
                  "out: expected float32 rows of ", weight.size(1), " numbers");
  GroupedRows p{};
  const Tensor rows = unit_rows(x), w = unit_rows(weight);
  p.dtype = dtype_of(weight, "weight");
  STD_TORCH_CHECK(dtype_of(x, "x") == p.dtype, "x: expected weight's dtype");
  p.weight = w.data_ptr(), p.group = w.stride(0), p.row = w.stride(1), p.N = w.size(1), p.C = w.size(2);
  const int64_t ldx = padded_channels(p.C);
  const int32_t* read = index ? ints(*index, "index") : nullptr;
  STD_TORCH_CHECK(m >= 0 && begin >= 0 && end <= (index ? index->size(0) : x.size(0)),
                  "begin, end: past the rows");
  Tensor packed = floats(x, m * ldx);
  float* to = static_cast<float*>(packed.data_ptr());
  p.x = to, p.out = static_cast<float*>(out.data_ptr()), p.out_row = out.stride(0);
  for (int64_t i = 0; i < m; ++i, to += ldx) {
    const int64_t r = read ? read[begin + i] : begin + i;
    if (r >= 0 && r < x.size(0))
      MMKERNELS_CALL(widen_row, p, element(rows.data_ptr(), p.dtype, r * rows.stride(0)), to);
    else
      for (int64_t c = 0; c < ldx; ++c) to[c] = 0.f;
  }
  const auto parts = parts_of(ints(counts, "counts"), counts.size(0), begin, end);
  int64_t step = p.C ? kBlockBytes / (p.C * bytes_of(p.dtype)) / 12 * 12 : p.N;
  step = step < 12 ? 12 : step > p.N ? (p.N ? p.N : 1) : step;
  const int64_t blocks = (p.N + step - 1) / step, tasks = blocks * static_cast<int64_t>(parts.size());
  run_tasks(tasks, workers(tasks, 2.0 * m * p.N * p.C / (tasks ? tasks : 1)), [&](int64_t task, int64_t) {
    const int64_t n0 = task % blocks * step, n1 = n0 + step < p.N ? n0 + step : p.N;
    MMKERNELS_CALL(multiply, p, parts[task / blocks], n0, n1);
  });
}

}  // namespace
}  // namespace mmkernels

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("grouped_rows__cpu", TORCH_BOX(&mmkernels::grouped_rows));
}
