// mmkernels._host: what the host CPU offers, for `mmkernels doctor`, and the image front end. Knows no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../common/isa.h"
#include "front_end.h"

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

using Pixels = py::array_t<uint8_t, py::array::c_style>;
using Table = py::array_t<int64_t, py::array::c_style>;
using Numbers = py::array_t<double, py::array::c_style>;

// See front_end.h. `half` says which of the two a table and an output of uint16 hold: "bf16" or "f16".
void front_end(const std::vector<Pixels>& images, const Table& jobs, const py::array& table,
               const Numbers& scale, const Numbers& shift, py::array out, const std::string& half,
               int threads) {
  std::vector<mmkernels::Picture> pictures;
  for (const Pixels& image : images) {
    if (image.ndim() != 3 || image.shape(2) != 3) throw py::value_error("images: expected uint8 [H, W, 3]");
    pictures.push_back({image.data(), image.shape(1), image.shape(0)});
  }
  if (jobs.ndim() != 2 || jobs.shape(1) != mmkernels::JOB_FIELDS)
    throw py::value_error("jobs: expected int64 [J, " + std::to_string(mmkernels::JOB_FIELDS) + "]");
  std::vector<mmkernels::Job> todo(jobs.shape(0));
  if (!todo.empty()) std::memcpy(todo.data(), jobs.data(), todo.size() * sizeof(mmkernels::Job));
  const bool wide = out.itemsize() == 4;
  if (out.ndim() != 2 || !(out.flags() & py::array::c_style) || (!wide && out.itemsize() != 2) ||
      table.itemsize() != out.itemsize() || table.size() != 768 || !(table.flags() & py::array::c_style) ||
      scale.size() != 3 || shift.size() != 3)
    throw py::value_error("out, table: expected rows and [3, 256] of one element type, scale and shift [3]");
  for (const mmkernels::Job& job : todo)
    if (out.shape(1) != 3 * job.patch * job.patch)
      throw py::value_error("out: its width is not that of a patch");
  const auto element = wide            ? mmkernels::Element::f32
                       : half == "f16" ? mmkernels::Element::f16
                                       : mmkernels::Element::bf16;
  const mmkernels::Output output{out.mutable_data(), out.shape(0), element,
                                 table.data(),       scale.data(), shift.data()};
  const std::string why = mmkernels::why_not(todo, pictures, output);
  if (!why.empty()) throw py::value_error(why);
  mmkernels::isa();  // a wrong MMKERNELS_ISA is an error here, not in a thread
  py::gil_scoped_release release;
  mmkernels::front_end(todo, pictures, output, threads);
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host CPU facts, and the image front end.";
  m.def("cpu_features", &cpu_features, "Instruction set extensions of this CPU: name -> present.");
  m.def("runnable_isas", &runnable_isas, "The kernel builds that this CPU can run, the widest last.");
  m.def(
      "isa", [] { return mmkernels::name(mmkernels::isa()); },
      "The kernel build this process runs (MMKERNELS_ISA).");
  m.def("front_end", &front_end, "Resizes, pads, normalises and cuts pictures into packed rows of patches.",
        py::arg("images"), py::arg("jobs"), py::arg("table"), py::arg("scale"), py::arg("shift"),
        py::arg("out"), py::arg("half"), py::arg("threads"));
}
