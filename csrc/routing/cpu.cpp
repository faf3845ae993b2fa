// Rows into groups on CPU: a counting sort, stable, in two passes over the ids. Stable ABI, baseline
// instruction set.
#include <tuple>
#include <vector>

#include "../common/binding.h"

namespace mmkernels {
namespace {

int32_t* new_ints(const Tensor& like, int64_t n, Tensor& keep) {
  const int64_t size[] = {n};
  keep = torch::stable::new_empty(like, size, ScalarType::Int);
  return static_cast<int32_t*>(keep.data_ptr());
}

// counts [E], offsets [E + 1], order [R], inverse [R], tile_group and tile_row [tiles]: see reference.py.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> route(const Tensor& groups, int64_t num_groups,
                                                                 int64_t tile) {
  STD_TORCH_CHECK(groups.dim() == 1 && groups.scalar_type() == ScalarType::Int, "groups: expected int32 [R]");
  STD_TORCH_CHECK(num_groups > 0 && tile > 0, "num_groups, tile: expected positive numbers");
  const Tensor ids = unit_rows(groups);
  const auto* id = static_cast<const int32_t*>(ids.data_ptr());
  const int64_t rows = groups.size(0), tiles = rows / tile + (rows < num_groups ? rows : num_groups);
  Tensor kept[6];
  int32_t *counts = new_ints(groups, num_groups, kept[0]),
          *offsets = new_ints(groups, num_groups + 1, kept[1]);
  int32_t *order = new_ints(groups, rows, kept[2]), *inverse = new_ints(groups, rows, kept[3]);
  int32_t *tile_group = new_ints(groups, tiles, kept[4]), *tile_row = new_ints(groups, tiles, kept[5]);
  for (int64_t e = 0; e < num_groups; ++e) counts[e] = 0;
  for (int64_t r = 0; r < rows; ++r)
    if (id[r] >= 0 && id[r] < num_groups) ++counts[id[r]];
  offsets[0] = 0;
  int64_t t = 0;
  for (int64_t e = 0; e < num_groups; ++e) {
    offsets[e + 1] = offsets[e] + counts[e];
    for (int64_t row = offsets[e]; row < offsets[e + 1]; row += tile, ++t)
      tile_group[t] = e, tile_row[t] = row;
  }
  for (; t < tiles; ++t) tile_group[t] = -1, tile_row[t] = offsets[num_groups];
  std::vector<int32_t> next(offsets, offsets + num_groups);
  for (int64_t r = 0; r < rows; ++r) {
    const bool some = id[r] >= 0 && id[r] < num_groups;
    inverse[r] = some ? next[id[r]]++ : -1;
    if (some) order[inverse[r]] = r;
  }
  for (int64_t i = offsets[num_groups]; i < rows; ++i) order[i] = -1;
  return {kept[0], kept[1], kept[2], kept[3], kept[4], kept[5]};
}

}  // namespace
}  // namespace mmkernels

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) { m.impl("route_groups__cpu", TORCH_BOX(&mmkernels::route)); }
