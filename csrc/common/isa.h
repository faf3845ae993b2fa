// Which build of the CPU kernels this process runs: the widest the CPU has, or the one that MMKERNELS_ISA
// names.
//
// cpu_kernels.cpp is compiled once per instruction set, with -DMMKERNELS_ISA=<isa>, and puts its functions in
// namespace mmkernels::<isa>. It must not include this file, nor any header with inline functions of its own:
// the linker keeps one copy of an inline function, which may be the one with instructions that the CPU lacks.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

// For cpu.cpp, inside namespace mmkernels. Declares `signature` once per instruction set:
// MMKERNELS_DECLARE(void f(const Params&))
#define MMKERNELS_DECLARE(signature) \
  namespace scalar {                 \
  signature;                         \
  }                                  \
  namespace avx2 {                   \
  signature;                         \
  }                                  \
  namespace avx512 {                 \
  signature;                         \
  }

// Calls the copy of `function` that this process runs: MMKERNELS_CALL(f, params);
#if defined(__x86_64__)
#define MMKERNELS_CALL(function, ...)                                                          \
  (::mmkernels::isa() == ::mmkernels::Isa::avx512 ? ::mmkernels::avx512::function(__VA_ARGS__) \
   : ::mmkernels::isa() == ::mmkernels::Isa::avx2 ? ::mmkernels::avx2::function(__VA_ARGS__)   \
                                                  : ::mmkernels::scalar::function(__VA_ARGS__))
#else
#define MMKERNELS_CALL(function, ...) ::mmkernels::scalar::function(__VA_ARGS__)
#endif

namespace mmkernels {

enum class Isa { scalar, avx2, avx512 };

inline const char* name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "scalar";
}

// The widest instruction set of this CPU that the operating system saves registers for.
inline Isa widest_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2) return avx512 ? Isa::avx512 : Isa::avx2;
#endif
  return Isa::scalar;
}

// A named instruction set is honoured or refused: running another one in silence would void a measurement.
inline Isa chosen_isa() {
  const char* wanted = std::getenv("MMKERNELS_ISA");
  if (wanted == nullptr || *wanted == '\0') return widest_isa();
  for (Isa isa : {Isa::scalar, Isa::avx2, Isa::avx512})
    if (wanted == std::string(name(isa)) && isa <= widest_isa()) return isa;
  throw std::runtime_error(std::string("MMKERNELS_ISA: got \"") + wanted +
                           "\", expected scalar, avx2 or avx512, and this CPU has at most " +
                           name(widest_isa()));
}

inline Isa isa() {
  static const Isa chosen = chosen_isa();
  return chosen;
}

}  // namespace mmkernels
