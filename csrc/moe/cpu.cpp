// The router and the experts' sum on CPU. Stable ABI, baseline instruction set.
//
// Rows of logits are worked off in fixed blocks by all threads; what they add to the losses is summed block
// after block, so the number of threads changes no bit. Places follow in one pass over the routes.
#include <algorithm>
#include <tuple>

#include "../common/isa.h"
#include "binding.h"
#include "route.h"

namespace mmkernels {

MMKERNELS_DECLARE(void route_rows(const MoeRoute& p, int64_t t0, int64_t t1, float* scratch, MoePart& part))
MMKERNELS_DECLARE(void route_rows_backward(const MoeRouteBackward& p, const float* share, float square,
                                           int64_t t0, int64_t t1, float* scratch))
MMKERNELS_DECLARE(void combine_rows(const MoeCombine& p, int64_t t0, int64_t t1, float* scratch))

namespace {

constexpr int64_t kBlock = 128;  // tokens
constexpr int64_t kPad = 16;     // the widest vector

int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

MoeRules rules_of(int64_t capacity, bool choices, bool whole, int64_t drop, int64_t normalize,
                  int64_t balance) {
  return {capacity, choices, whole, Drop(drop), Normalize(normalize), Balance(balance)};
}

int64_t counted(const bool* mask, int64_t tokens) {
  return mask ? std::count(mask, mask + tokens, true) : tokens;
}

// What p[t, e] of a counted token weighs in the auxiliary loss, by the routes to e; `tokens` of them count.
std::vector<float> shares(const MoeRules& rules, int64_t T, int64_t E, int64_t K, const int32_t* experts,
                          const bool* mask, float tokens) {
  std::vector<int64_t> routes(E);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t j = 0; j < (rules.balance == kFirstChoices ? 1 : K); ++j)
      if (!mask || mask[t]) ++routes[experts[t * K + j]];
  std::vector<float> found(E);
  for (int64_t e = 0; e < E; ++e) found[e] = share_of(rules, E, K, routes[e], tokens) / tokens;
  return found;
}

// The routes of every expert that stay, by the largest score, the first among equals; `kept` in token order.
void keep_best(const MoeRoute& p, std::vector<bool>& kept) {
  std::vector<std::vector<std::pair<float, int64_t>>> all(p.E);
  for (int64_t t = 0, i = 0; t < p.T; ++t)
    for (int64_t j = 0; j < p.K; ++j, ++i) {
      const int32_t e = p.experts[i];
      const float score = p.rules.drop == kByNoise ? finite(p.noise[t * p.E + e]) : p.weights[i];
      if (kept[i]) all[e].push_back({-score, i});
    }
  for (auto& routes : all) {
    if (static_cast<int64_t>(routes.size()) <= p.rules.capacity) continue;
    const auto last = routes.begin() + p.rules.capacity;
    std::nth_element(routes.begin(), last, routes.end());
    for (auto route = last; route != routes.end(); ++route) kept[route->second] = false;
  }
}

// chosen, counts, order, inverse.
void place(const MoeRoute& p) {
  const int64_t routes = p.T * p.K;
  std::vector<bool> kept(routes);
  std::fill(p.chosen, p.chosen + p.E, 0);
  for (int64_t i = 0; i < routes; ++i) {
    kept[i] = !p.mask || p.mask[i / p.K];
    if (kept[i]) ++p.chosen[p.experts[i]];
  }
  const bool best =
      p.rules.capacity >= 0 && p.rules.drop != kByPosition && (p.rules.drop == kByProbs || p.noise);
  if (best) keep_best(p, kept);
  std::vector<int32_t> start(p.E), taken(p.E);
  int32_t at = 0;
  for (int64_t e = 0; e < p.E; ++e) {
    p.counts[e] = kept_of(p.chosen[e], p.rules.capacity);
    start[e] = at, at += p.counts[e];
  }
  std::fill(p.order + at, p.order + routes, -1);
  const auto arrive = [&](int64_t i) {
    const int32_t e = p.experts[i];
    const bool some = kept[i] && taken[e] < p.counts[e];
    p.inverse[i] = some ? start[e] + taken[e]++ : -1;
    if (some) p.order[p.inverse[i]] = static_cast<int32_t>(i);
  };
  if (p.rules.choices) {
    for (int64_t j = 0; j < p.K; ++j)
      for (int64_t t = 0; t < p.T; ++t) arrive(t * p.K + j);
  } else {
    for (int64_t i = 0; i < routes; ++i) arrive(i);
  }
}

using Routed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// weights, experts, order, inverse, counts, chosen, aux_loss, z_loss: see reference.py.
Routed choose(const Tensor& logits, const std::optional<Tensor>& noise, const std::optional<Tensor>& mask,
              int64_t k, int64_t capacity, bool choices, bool whole, int64_t drop, int64_t normalize_how,
              int64_t balance) {
  STD_TORCH_CHECK(logits.dim() == 2 && 1 <= k && k <= logits.size(1),
                  "k: expected 1 to the experts of logits [T, E]");
  const Tensor rows = unit_rows(logits);
  MoeRoute p{};
  p.logits = rows.data_ptr(), p.dtype = dtype_of(logits, "logits"), p.stride = rows.stride(0);
  p.T = rows.size(0), p.E = rows.size(1), p.K = k;
  p.rules = rules_of(capacity, choices, whole, drop, normalize_how, balance);
  if (noise) {
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

  const int64_t blocks = (p.T + kBlock - 1) / kBlock, wide = padded(p.E);
  const int64_t threads = workers(blocks, kBlock * p.E * (20. + 4. * k));
  Tensor sums = floats(logits, blocks * wide), scratch = floats(logits, threads * 3 * wide);
  std::fill_n(data<float>(sums), blocks * wide, 0.f);
  std::vector<MoePart> parts(blocks);
  run_tasks(blocks, threads, [&](int64_t block, int64_t worker) {
    parts[block] = {data<float>(sums) + block * wide, 0.};
    MMKERNELS_CALL(route_rows, p, block * kBlock, std::min(p.T, (block + 1) * kBlock),
                   data<float>(scratch) + worker * 3 * wide, parts[block]);
  });
  place(p);
  for (int64_t t = 0; t < p.T; ++t) normalize(p.rules.normalize, p.inverse + t * k, k, p.weights + t * k);
  const int64_t real = counted(p.mask, p.T);
  const float tokens = static_cast<float>(std::max<int64_t>(1, whole ? p.T : real));
  const auto share = shares(p.rules, p.T, p.E, k, p.experts, p.mask, tokens);
  double aux_loss = 0, square = 0;
  for (const MoePart& part : parts) {
    for (int64_t e = 0; e < p.E; ++e) aux_loss += static_cast<double>(share[e]) * part.share[e];
    square += part.square;
  }
  *data<float>(aux) = static_cast<float>(aux_loss);
  *data<float>(z) = static_cast<float>(square / tokens);
  return {weights, experts, order, inverse, counts, chosen, aux, z};
}

Tensor choose_backward(const Tensor& dweights, const Tensor& daux, const Tensor& dz, const Tensor& logits,
                       const std::optional<Tensor>& mask, const Tensor& experts, const Tensor& inverse,
                       bool whole, int64_t normalize_how, int64_t balance) {
  const Tensor rows = unit_rows(logits);
  MoeRouteBackward p{};
  p.logits = rows.data_ptr(), p.dtype = dtype_of(logits, "logits"), p.stride = rows.stride(0);
  p.T = rows.size(0), p.E = rows.size(1), p.K = experts.size(1);
  p.rules = rules_of(-1, false, whole, 0, normalize_how, balance);
  p.mask = mask_of(mask, p.T);
  p.experts = data<const int32_t>(experts), p.inverse = data<const int32_t>(inverse);
  p.dweights = data<const float>(dweights);
  Tensor dlogits = make(logits, {p.T, p.E}, logits.scalar_type());
  p.dlogits = dlogits.data_ptr();
  const int64_t real = counted(p.mask, p.T);
  const float tokens = static_cast<float>(std::max<int64_t>(1, whole ? p.T : real));
  auto share = shares(p.rules, p.T, p.E, p.K, p.experts, p.mask, tokens);
  const int64_t blocks = (p.T + kBlock - 1) / kBlock, wide = padded(p.E);
  share.resize(wide);
  for (float& s : share) s *= *data<const float>(daux);
  const float square = *data<const float>(dz) / tokens;
  const int64_t threads = workers(blocks, kBlock * p.E * 20.);
  Tensor scratch = floats(logits, threads * 4 * wide);
  run_tasks(blocks, threads, [&](int64_t block, int64_t worker) {
    MMKERNELS_CALL(route_rows_backward, p, share.data(), square, block * kBlock,
                   std::min(p.T, (block + 1) * kBlock), data<float>(scratch) + worker * 4 * wide);
  });
  return dlogits;
}

// out[t] = sum_j weights[t, j] y[inverse[t K + j]] over the first `rows` rows of y.
void combine(const Tensor& y, const std::optional<Tensor>& weights, const Tensor& inverse, int64_t rows,
             Tensor& out) {
  STD_TORCH_CHECK(y.dim() == 2 && y.is_contiguous() && out.is_contiguous() && rows <= y.size(0) &&
                      out.size(1) == y.size(1) && y.scalar_type() == ScalarType::Float,
                  "y, out: expected contiguous float32 rows [M, C] and [T, C]");
  MoeCombine p{};
  p.T = out.size(0), p.C = out.size(1), p.rows = rows, p.K = p.T ? inverse.size(0) / p.T : 0;
  p.y = data<const float>(y), p.inverse = data<const int32_t>(inverse);
  p.weights = weights ? data<const float>(*weights) : nullptr;
  p.out = out.data_ptr(), p.dtype = dtype_of(out, "out");
  const int64_t step = 16, blocks = (p.T + step - 1) / step, wide = padded(p.C);
  const int64_t threads = workers(blocks, 2. * step * p.K * p.C);
  Tensor scratch = floats(y, threads * wide);
  run_tasks(blocks, threads, [&](int64_t block, int64_t worker) {
    MMKERNELS_CALL(combine_rows, p, block * step, std::min(p.T, (block + 1) * step),
                   data<float>(scratch) + worker * wide);
  });
}

}  // namespace
}  // namespace mmkernels

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("moe_choose__cpu", TORCH_BOX(&mmkernels::choose));
  m.impl("moe_choose_backward__cpu", TORCH_BOX(&mmkernels::choose_backward));
  m.impl("moe_combine__cpu", TORCH_BOX(&mmkernels::combine));
}
