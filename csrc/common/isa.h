// Which of the compiled instruction sets runs: chosen once, at the first call; torch-free.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace pydistill {

enum class Isa : int { base, avx2, avx512 };
inline constexpr const char* kIsaNames[] = {"base", "avx2", "avx512"};

inline bool supported(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::avx2) return avx2;
  if (isa == Isa::avx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
#endif
  return isa == Isa::base;
}

// The best set this processor has, or the one PYDISTILL_ISA names: a test's way to run each of them.
inline Isa isa() {
  static const Isa chosen = [] {
    if (const char* name = std::getenv("PYDISTILL_ISA"); name && *name) {
      for (int i = 0; i < 3; ++i)
        if (std::string(name) == kIsaNames[i]) {
          if (supported(static_cast<Isa>(i))) return static_cast<Isa>(i);
          throw std::runtime_error("PYDISTILL_ISA=" + std::string(name) + ": this processor does not have it");
        }
      throw std::runtime_error("PYDISTILL_ISA=" + std::string(name) + ": expected base, avx2 or avx512");
    }
    return supported(Isa::avx512) ? Isa::avx512 : supported(Isa::avx2) ? Isa::avx2 : Isa::base;
  }();
  return chosen;
}

}  // namespace pydistill
