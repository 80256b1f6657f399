#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace us3l {
namespace {

bool available(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  switch (isa) {
    case Isa::portable:
      return true;
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::portable;
}

constexpr Isa kBestFirst[] = {Isa::avx512, Isa::avx2, Isa::portable};

Isa choose() {
  const char* forced = std::getenv("US3L_ISA");
  std::string names;
  for (Isa isa : kBestFirst) {
    if (!available(isa)) continue;
    if (forced == nullptr || *forced == '\0' || forced == std::string(isa_name(isa))) return isa;
    names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  throw std::runtime_error("US3L_ISA: expected one of " + names + " on this CPU, got '" + forced + "'");
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();  // after an exception the next call tries, and throws, again
  return chosen;
}

bool has_bfloat16_pairs() {
#if defined(__x86_64__)
  return isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

const char* isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "portable";
}

std::vector<std::pair<std::string, bool>> cpu_features() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#define US3L_FEATURE(name) {name, __builtin_cpu_supports(name) != 0}
  return {US3L_FEATURE("avx2"),     US3L_FEATURE("fma"),      US3L_FEATURE("avx512f"),
          US3L_FEATURE("avx512bw"), US3L_FEATURE("avx512dq"), US3L_FEATURE("avx512vl"), US3L_FEATURE("avx512bf16")};
#undef US3L_FEATURE
#else
  return {};
#endif
}

}  // namespace us3l
