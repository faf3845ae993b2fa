// Binding of the CPU kernels: checks, outputs, workspace, tasks over threads. Stable ABI, baseline
// instruction set.
#include <optional>
#include <tuple>

#include "cpu_tasks.h"

namespace mmkernels {
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

void check_heads(const Tensor& x, const char* name, const IntervalAttention& p) {
  STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == p.B && x.size(1) == p.H && x.size(2) == p.T &&
                      x.scalar_type() == ScalarType::Float,
                  name, ": expected float32 [", p.B, ", ", p.H, ", ", p.T, "]");
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
  p.rows = p.keys = dtype_of(q, "q");
  STD_TORCH_CHECK(dtype_of(k, "k") == p.rows && dtype_of(v, "v") == p.rows, "k, v: expected q's dtype");
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

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lo,
                                   const Tensor& hi, const Maybe& uniform, const Maybe& slopes,
                                   const Maybe& seed, double scale, double dropout_p) {
  IntervalAttention p{};
  const Inputs in = describe(p, q, k, v, lo, hi, uniform, slopes, seed, scale, dropout_p);
  const int64_t size[] = {p.B, p.T, p.H, p.D}, lse_size[] = {p.B, p.H, p.T};
  Tensor out = torch::stable::new_empty(q, size),
         lse = torch::stable::new_empty(q, lse_size, ScalarType::Float);
  p.out = tokens(out);
  p.lse = per_row(lse);
  const Tensor space = floats(q, forward_workspace(p));
  attend(p, static_cast<float*>(space.data_ptr()));
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
  STD_TORCH_CHECK(dtype_of(dout, "dout") == p.rows && dtype_of(out, "out") == p.rows,
                  "dout, out: expected q's dtype");
  check_heads(lse, "lse", p);
  const Tensor douts = unit_rows(dout), outs = unit_rows(out);
  p.dout = tokens(douts), p.out = tokens(outs), p.lse = per_row(lse);
  if (dlse) {
    check_heads(*dlse, "dlse", p);
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
  const Tensor space = floats(q, backward_workspace(p));
  differentiate(p, static_cast<float*>(space.data_ptr()));
  return {dq, dk, dv};
}

}  // namespace
}  // namespace mmkernels

STABLE_TORCH_LIBRARY_IMPL(mmkernels, CPU, m) {
  m.impl("interval_attention__cpu", TORCH_BOX(&mmkernels::forward));
  m.impl("interval_attention_backward__cpu", TORCH_BOX(&mmkernels::backward));
}
