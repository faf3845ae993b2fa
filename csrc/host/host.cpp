// mmkernels._host: what the host CPU offers, for `mmkernels doctor`. Knows no torch.
#include <pybind11/pybind11.h>

#include "../common/isa.h"

namespace py = pybind11;

namespace {

py::dict cpu_features() {
  py::dict features;
#if defined(__x86_64__)
  __builtin_cpu_init();
#define MMKERNELS_FEATURE(name) features[name] = static_cast<bool>(__builtin_cpu_supports(name));
  MMKERNELS_FEATURE("avx2")
  MMKERNELS_FEATURE("fma")
  MMKERNELS_FEATURE("avx512f")
  MMKERNELS_FEATURE("avx512bw")
  MMKERNELS_FEATURE("avx512vl")
  MMKERNELS_FEATURE("avx512dq")
  MMKERNELS_FEATURE("avx512bf16")
  MMKERNELS_FEATURE("amx-tile")
  MMKERNELS_FEATURE("amx-bf16")
#undef MMKERNELS_FEATURE
#endif
  return features;
}

py::list runnable_isas() {
  py::list isas;
  for (mmkernels::Isa isa : {mmkernels::Isa::scalar, mmkernels::Isa::avx2, mmkernels::Isa::avx512})
    if (isa <= mmkernels::widest_isa()) isas.append(mmkernels::name(isa));
  return isas;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host CPU facts.";
  m.def("cpu_features", &cpu_features, "Instruction set extensions of this CPU: name -> present.");
  m.def("runnable_isas", &runnable_isas, "The kernel builds that this CPU can run, the widest last.");
  m.def(
      "isa", [] { return mmkernels::name(mmkernels::isa()); },
      "The kernel build this process runs (MMKERNELS_ISA).");
}
