// Both passes as tasks over threads: for this room's binding, and for ops that attend in the middle. Baseline
// instruction set.
#pragma once

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

// The number of threads worth starting. Whether rows see few keys or all is not known here: an upper bound.
inline int64_t crew_of(const IntervalAttention& p, int64_t tasks, double passes) {
  return workers(tasks, passes * 4.0 * p.B * p.H * p.T * p.J * p.D / (tasks > 0 ? tasks : 1));
}
inline int64_t forward_tasks(const IntervalAttention& p) { return p.B * p.G * blocks_of(p); }
inline int64_t forward_crew(const IntervalAttention& p) { return crew_of(p, forward_tasks(p), 1); }
inline int64_t forward_workspace(const IntervalAttention& p) {
  return forward_crew(p) * MMKERNELS_CALL(forward_floats, p);
}
inline void attend(const IntervalAttention& p, float* workspace) {
  const int64_t each = MMKERNELS_CALL(forward_floats, p);
  run_tasks(forward_tasks(p), forward_crew(p), [&](int64_t task, int64_t worker) {
    MMKERNELS_CALL(forward, p, task, workspace + worker * each);
  });
}

inline int64_t backward_tasks(const IntervalAttention& p) { return p.B * p.G * shares_of(p); }
inline int64_t backward_crew(const IntervalAttention& p) { return crew_of(p, backward_tasks(p), 2.5); }
// Alone in its key head, a task combines at once and its worker reuses the sums; else all shares must be
// there first.
inline int64_t backward_sums(const IntervalAttention& p) {
  return shares_of(p) == 1 ? backward_crew(p) : backward_tasks(p);
}
inline int64_t backward_workspace(const IntervalAttention& p) {
  return backward_crew(p) * MMKERNELS_CALL(backward_floats, p) +
         backward_sums(p) * MMKERNELS_CALL(sums_floats, p);
}
// Needs at least one row, key and head.
inline void differentiate(const IntervalAttentionBackward& p, float* workspace) {
  const int64_t crew = backward_crew(p), shares = shares_of(p), heads = p.B * p.G;
  const int64_t each = MMKERNELS_CALL(backward_floats, p), sum = MMKERNELS_CALL(sums_floats, p);
  float* sums = workspace + crew * each;
  run_tasks(backward_tasks(p), crew, [&](int64_t task, int64_t worker) {
    float *mine = workspace + worker * each, *total = sums + (shares == 1 ? worker : task) * sum;
    MMKERNELS_CALL(backward, p, task, mine, total);
    if (shares == 1) MMKERNELS_CALL(combine, p, task, total, mine);
  });
  if (shares == 1) return;
  run_tasks(heads, crew < heads ? crew : heads, [&](int64_t head, int64_t worker) {
    MMKERNELS_CALL(combine, p, head, sums + head * shares * sum, workspace + worker * each);
  });
}

}  // namespace mmkernels
