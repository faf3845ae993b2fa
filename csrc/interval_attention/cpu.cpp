// Binding of the CPU kernels: checks, outputs, workspace, tasks over threads. Stable ABI, baseline
// instruction set.
#include <optional>
#include <tuple>

#include "../common/binding.h"
#include "../common/isa.h"
#include "params.h"

namespace mmkernels {

MMKERNELS_DECLARE(void forward(const IntervalAttention& p, int64_t task, float* workspace))
MMKERNELS_DECLARE(int64_t forward_floats(const IntervalAttention& p))
MMKERNELS_DECLARE(void backward(const IntervalAttentionBackward& p, int64_t task, float* workspace,
                                float* sums))
MMKERNELS_DECLARE(void combine(const IntervalAttentionBackward& p, int64_t head, const float* sums,
                               float* row))
MMKERNELS_DECLARE(int64_t backward_floats(const IntervalAttention& p))
MMKERNELS_DECLARE(int64_t sums_floats(const IntervalAttention& p))

namespace {

using Maybe = std::optional<Tensor>;

Tokens tokens(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

PerRow per_row(const Tensor& x) {
  return x.dim() == 2 ? PerRow{x.data_ptr(), x.stride(0), 0, x.stride(1)}
                      : PerRow{x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

void check(const Tensor& x, const char* name, int64_t b, int64_t rows, int64_t heads, int64_t d) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == b && x.size(1) == rows && x.size(2) == heads && x.size(3) == d,
                  name, ": expected shape [", b, ", ", rows, ", ", heads, ", ", d, "]");
}

void check_rows(const Tensor& x, const char* name, ScalarType type, int64_t b, int64_t t) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == b && x.size(1) == t && x.scalar_type() == type, name,
                  ": expected [", b, ", ", t, "] of its dtype");
}

uint32_t mix(uint32_t x) {  // as in cpu_block.h, which is not for this instruction set
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Tensors that the plain pointers point into, for as long as the kernels run.
struct Inputs {
  Tensor q, k, v, slopes;
};

Inputs describe(IntervalAttention& p, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lo,
                const Tensor& hi, const Maybe& uniform, const Maybe& slopes, const Maybe& seed, double scale,
                double dropout_p) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "q, k: expected [B, T, H, D] and [B, J, G, D]");
  p.B = q.size(0), p.T = q.size(1), p.H = q.size(2), p.D = q.size(3), p.J = k.size(1), p.G = k.size(2);
  STD_TORCH_CHECK(p.D > 0 && p.D <= 256 && p.D % 8 == 0, "q: got head width ", p.D,
                  ", expected a multiple of 8 up to 256");
  STD_TORCH_CHECK(p.G > 0 && p.H % p.G == 0, "k: got ", p.G, " heads, expected a divisor of ", p.H);
  check(k, "k", p.B, p.J, p.G, p.D);
  check(v, "v", p.B, p.J, p.G, p.D);
  check_rows(lo, "lo", ScalarType::Int, p.B, p.T);
  check_rows(hi, "hi", ScalarType::Int, p.B, p.T);
  p.dtype = dtype_of(q, "q");
  STD_TORCH_CHECK(dtype_of(k, "k") == p.dtype && dtype_of(v, "v") == p.dtype, "k, v: expected q's dtype");
  Inputs in{unit_rows(q), unit_rows(k), unit_rows(v), slopes ? *slopes : q};
  p.q = tokens(in.q), p.k = tokens(in.k), p.v = tokens(in.v);
  p.lo = per_row(lo), p.hi = per_row(hi);
  if (uniform) {
    check_rows(*uniform, "uniform", ScalarType::Bool, p.B, p.T);
    p.uniform = per_row(*uniform);
  }
  if (slopes) {
    STD_TORCH_CHECK(slopes->dim() == 1 && slopes->size(0) == p.H, "alibi_slopes: expected [", p.H, "]");
    in.slopes = torch::stable::contiguous(torch::stable::to(*slopes, ScalarType::Float));
    p.slopes = static_cast<const float*>(in.slopes.data_ptr());
  }
  p.scale = static_cast<float>(scale);
  p.dropout_p = static_cast<float>(dropout_p);
  if (dropout_p > 0) {
    STD_TORCH_CHECK(seed && seed->numel() == 1 && seed->scalar_type() == ScalarType::Long,
                    "seed: expected an int64 tensor of one element");
    const auto bits = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr()));
    p.seed = static_cast<uint32_t>(bits) ^ mix(static_cast<uint32_t>(bits >> 32));
    p.threshold = static_cast<uint32_t>(dropout_p * 4294967296.0);
  }
  return in;
}

// Products of one pass over every key: an upper bound, for the number of threads only.
double flops(const IntervalAttention& p) { return 4.0 * rows_of(p) * p.J * p.D; }

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lo,
                                   const Tensor& hi, const Maybe& uniform, const Maybe& slopes,
                                   const Maybe& seed, double scale, double dropout_p) {
  IntervalAttention p{};
  const Inputs in = describe(p, q, k, v, lo, hi, uniform, slopes, seed, scale, dropout_p);
  const int64_t size[] = {p.B, p.T, p.H, p.D}, lse_size[] = {p.B, p.H, p.T};
  Tensor out = torch::stable::new_empty(q, size),
         lse = torch::stable::new_empty(q, lse_size, ScalarType::Float);
  p.out = tokens(out);
  p.lse = static_cast<float*>(lse.data_ptr());
  const int64_t tasks = p.B * p.G * blocks_of(p), crew = workers(tasks, flops(p) / blocks_of(p));
  const int64_t each = MMKERNELS_CALL(forward_floats, p);
  const Tensor space = floats(q, crew * each);
  float* workspace = static_cast<float*>(space.data_ptr());
  run_tasks(tasks, crew, [&](int64_t task, int64_t worker) {
    MMKERNELS_CALL(forward, p, task, workspace + worker * each);
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout, const Maybe& dlse, const Tensor& q,
                                            const Tensor& k, const Tensor& v, const Tensor& out,
                                            const Tensor& lse, const Tensor& lo, const Tensor& hi,
                                            const Maybe& uniform, const Maybe& slopes, const Maybe& seed,
                                            double scale, double dropout_p) {
  IntervalAttentionBackward p{};
  const Inputs in = describe(p, q, k, v, lo, hi, uniform, slopes, seed, scale, dropout_p);
  check(dout, "dout", p.B, p.T, p.H, p.D);
  check(out, "out", p.B, p.T, p.H, p.D);
  STD_TORCH_CHECK(dtype_of(dout, "dout") == p.dtype && dtype_of(out, "out") == p.dtype,
                  "dout, out: expected q's dtype");
  STD_TORCH_CHECK(lse.dim() == 3 && lse.is_contiguous() && lse.numel() == p.B * p.H * p.T &&
                      lse.scalar_type() == ScalarType::Float,
                  "lse: expected the forward's");
  const Tensor douts = unit_rows(dout), outs = unit_rows(out);
  p.dout = tokens(douts), p.out = tokens(outs), p.lse = static_cast<float*>(lse.data_ptr());
  if (dlse) {
    STD_TORCH_CHECK(
        dlse->dim() == 3 && dlse->numel() == p.B * p.H * p.T && dlse->scalar_type() == ScalarType::Float,
        "dlse: expected float32 like lse");
    p.dlse = per_row(*dlse);
  }
  const int64_t rows[] = {p.B, p.T, p.H, p.D}, keys[] = {p.B, p.J, p.G, p.D};
  Tensor dq = torch::stable::new_empty(q, rows), dk = torch::stable::new_empty(k, keys),
         dv = torch::stable::new_empty(v, keys);
  p.dq = tokens(dq), p.dk = tokens(dk), p.dv = tokens(dv);
  if (p.B * p.J * p.H * p.D == 0 || p.T == 0) {
    for (Tensor* x : {&dq, &dk, &dv}) torch::stable::zero_(*x);
    return {dq, dk, dv};
  }
  const int64_t shares = shares_of(p), heads = p.B * p.G, tasks = heads * shares;
  const int64_t crew = workers(tasks, 2.5 * flops(p) / shares);
  const int64_t each = MMKERNELS_CALL(backward_floats, p), sum = MMKERNELS_CALL(sums_floats, p);
  // Alone in its key head, a task combines at once, and its worker reuses the sums; else all shares must be
  // there.
  const bool alone = shares == 1;
  const Tensor space = floats(q, crew * each + (alone ? crew : tasks) * sum);
  float *workspace = static_cast<float*>(space.data_ptr()), *sums = workspace + crew * each;
  run_tasks(tasks, crew, [&](int64_t task, int64_t worker) {
    float *mine = workspace + worker * each, *total = sums + (alone ? worker : task) * sum;
    MMKERNELS_CALL(backward, p, task, mine, total);
    if (alone) MMKERNELS_CALL(combine, p, task, total, mine);
  });
  if (!alone)
    run_tasks(heads, crew < heads ? crew : heads, [&](int64_t head, int64_t worker) {
      MMKERNELS_CALL(combine, p, head, sums + head * shares * sum, workspace + worker * each);
    });
  return {dq, dk, dv};
}

}  // namespace
}  // namespace mmkernels

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("interval_attention__cpu", TORCH_BOX(&mmkernels::forward));
  m.impl("interval_attention_backward__cpu", TORCH_BOX(&mmkernels::backward));
}
