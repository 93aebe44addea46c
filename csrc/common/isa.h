// Which of the compiled instruction sets runs: chosen once, at the first call; torch-free.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "scalar.h"

namespace pydistill {

// Each includes those before it. avx512_bf16: sums of products of pairs, of bf16 and of 16-bit integers (VNNI); amx:
// bf16 matrix tiles.
enum class Isa : int { base, avx2, avx512, avx512_bf16, amx };
inline constexpr int kIsas = 5;
inline constexpr const char* kIsaNames[kIsas] = {"base", "avx2", "avx512", "avx512_bf16", "amx"};

// Whether bf16 matrix tiles can be used: the processor has them and Linux grants this process their registers.
inline bool amx_granted() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  if ((d & bf16) == 0 || (d & tile) == 0) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // of arch_prctl
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

inline bool supported(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == Isa::avx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (isa == Isa::avx512) return avx512;
  const bool pairs = avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
  if (isa == Isa::avx512_bf16) return pairs;
  if (isa == Isa::amx) return pairs && amx_granted();
#endif
  return isa == Isa::base;
}

// The best set this processor has, or the one named by PYDISTILL_ISA, so that tests can run each of them.
inline Isa isa() {
  static const Isa chosen = [] {
    if (const char* name = std::getenv("PYDISTILL_ISA"); name && *name) {
      for (int i = 0; i < kIsas; ++i)
        if (std::string(name) == kIsaNames[i]) {
          if (supported(static_cast<Isa>(i))) return static_cast<Isa>(i);
          std::string here;
          for (int j = 0; j < kIsas; ++j)
            if (supported(static_cast<Isa>(j))) here += (j ? ", " : "") + std::string(kIsaNames[j]);
          throw std::runtime_error("PYDISTILL_ISA=" + std::string(name) +
                                   ": expected what this processor has: " + here);
        }
      throw std::runtime_error("PYDISTILL_ISA=" + std::string(name) +
                               ": expected base, avx2, avx512, avx512_bf16 or amx");
    }
    int best = kIsas - 1;
    while (!supported(static_cast<Isa>(best))) --best;
    return static_cast<Isa>(best);
  }();
  return chosen;
}

// Of kernels by instruction set, from the base on, the one to run; the last serves all better sets too, or `last` does.
template <class Kernel, std::size_t N>
Kernel* best_of(Kernel* const (&kernels)[N], Isa last = static_cast<Isa>(N - 1)) {
  return kernels[std::min(static_cast<std::size_t>(isa()), static_cast<std::size_t>(last))];
}
// Kernels in float64 end at AVX2.
template <class Kernel, std::size_t N>
Kernel* best_of(Kernel* const (&kernels)[N], Scalar scalar) {
  return best_of(kernels, scalar == Scalar::f64 ? Isa::avx2 : static_cast<Isa>(N - 1));
}

}  // namespace pydistill
