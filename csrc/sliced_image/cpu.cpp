// Binding of the CPU kernels that bring visual tokens, learned separators and text into one sequence, and
// their gradients back. Stable ABI, baseline instruction set.
#include <cstring>
#include <optional>

#include "../common/binding.h"
#include "../common/isa.h"
#include "params.h"

namespace mmkernels {

MMKERNELS_DECLARE(void convert_row(Row from, Row to, int64_t n, float* scratch))
MMKERNELS_DECLARE(void add_row(Row from, int64_t n, bool first, float* sum, float* scratch))
MMKERNELS_DECLARE(void write_row(const float* sum, Row to, int64_t n))

namespace {

constexpr int64_t kTask = 16;      // rows
constexpr int64_t kCostOfRow = 8;  // a moved number, in operations

struct Rows {
  Tensor kept;
  Dtype dtype;
  int64_t count, stride;

  Rows(const Tensor& x, const char* name, int64_t width)
      : kept(unit_rows(x)), dtype(dtype_of(x, name)), count(x.size(0)), stride(kept.stride(0)) {
    STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == width, name, ": expected rows of ", width, " numbers");
  }
  Row at(int64_t i) const { return {element(kept.data_ptr(), dtype, i * stride), dtype}; }
};

const int64_t* indices(const Tensor& index) {
  STD_TORCH_CHECK(index.dim() == 1 && index.scalar_type() == ScalarType::Long &&
                      (index.size(0) < 2 || index.stride(0) == 1),
                  "index: expected a contiguous int64 vector");
  return static_cast<const int64_t*>(index.data_ptr());
}

void copy(Row from, Row to, int64_t n, float* scratch) {
  if (from.dtype == to.dtype)
    std::memcpy(to.p, from.p, n * bytes_of(to.dtype));
  else
    MMKERNELS_CALL(convert_row, from, to, n, scratch);
}

int64_t padded(int64_t n) { return (n + 31) / 32 * 32; }

// out[t] = visual[i] for i = index[t] >= 0, special[-2 - i] for i <= -2, tokens[t] for -1 and for rows that
// are not there.
Tensor splice(const Tensor& tokens, const Tensor& visual, const std::optional<Tensor>& special,
              const Tensor& index) {
  const int64_t t = tokens.size(0), c = tokens.size(1), size[] = {t, c};
  const Tensor out = torch::stable::new_empty(tokens, size);
  const Rows text(tokens, "tokens", c), pictures(visual, "visual", c), to(out, "out", c);
  const Rows more(special ? *special : visual, "special", c);
  const int64_t* i = indices(index);
  STD_TORCH_CHECK(index.size(0) == t, "index: expected ", t, " places");
  const int64_t tasks = (t + kTask - 1) / kTask, threads = workers(tasks, kCostOfRow * kTask * c);
  Tensor space = floats(tokens, threads * padded(c));
  float* scratch = static_cast<float*>(space.data_ptr());
  run_tasks(tasks, threads, [&](int64_t task, int64_t worker) {
    for (int64_t r = task * kTask; r < t && r < (task + 1) * kTask; ++r) {
      const bool picture = i[r] >= 0 && i[r] < pictures.count;
      const bool learned = special && i[r] <= -2 && -2 - i[r] < more.count;
      const Row from = picture ? pictures.at(i[r]) : learned ? more.at(-2 - i[r]) : text.at(r);
      copy(from, to.at(r), c, scratch + worker * padded(c));
    }
  });
  return out;
}

// grad[i] = the sum over index[t] = i of dout[t], in the order of t; like gives shape and dtype.
Tensor gather(const Tensor& dout, const Tensor& index, const Tensor& like) {
  const int64_t t = dout.size(0), c = dout.size(1), rows = like.size(0), size[] = {rows, c};
  const Tensor grad = torch::stable::new_empty(like, size);
  const Rows from(dout, "dout", c), to(grad, "like", c);
  const int64_t* i = indices(index);
  STD_TORCH_CHECK(index.size(0) == t, "index: expected ", t, " places");
  const int64_t lists[] = {rows + 1 + t};
  Tensor places = torch::stable::new_empty(index, lists);
  int64_t* start = static_cast<int64_t*>(places.data_ptr());
  int64_t* place = start + rows + 1;
  std::memset(start, 0, (rows + 1) * sizeof(int64_t));
  for (int64_t r = 0; r < t; ++r)
    if (i[r] >= 0 && i[r] < rows) ++start[i[r] + 1];
  for (int64_t v = 0; v < rows; ++v) start[v + 1] += start[v];
  for (int64_t r = 0; r < t; ++r)
    if (i[r] >= 0 && i[r] < rows) place[start[i[r]]++] = r;  // now start[v] is where v's list ends
  const int64_t tasks = (rows + kTask - 1) / kTask, threads = workers(tasks, kCostOfRow * kTask * c);
  Tensor space = floats(dout, threads * 2 * padded(c));
  float* scratch = static_cast<float*>(space.data_ptr());
  run_tasks(tasks, threads, [&](int64_t task, int64_t worker) {
    float *sum = scratch + worker * 2 * padded(c), *one = sum + padded(c);
    for (int64_t v = task * kTask; v < rows && v < (task + 1) * kTask; ++v) {
      const int64_t first = v ? start[v - 1] : 0, last = start[v];
      const Row into = to.at(v);
      if (first == last) {
        std::memset(into.p, 0, c * bytes_of(into.dtype));
      } else if (last - first == 1) {
        copy(from.at(place[first]), into, c, one);
      } else {
        for (int64_t n = first; n < last; ++n)
          MMKERNELS_CALL(add_row, from.at(place[n]), c, n == first, sum, one);
        MMKERNELS_CALL(write_row, sum, into, c);
      }
    }
  });
  return grad;
}

}  // namespace
}  // namespace mmkernels

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("splice_rows__cpu", TORCH_BOX(&mmkernels::splice));
  m.impl("splice_gather__cpu", TORCH_BOX(&mmkernels::gather));
}
