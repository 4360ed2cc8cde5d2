#include "isa.h"

#include <atomic>
#include <stdexcept>

namespace fd {
namespace {

Isa best() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512) return Isa::kAvx512;
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kBase;
}

std::atomic<Isa>& setting() {
  static std::atomic<Isa> value{best()};
  return value;
}

}  // namespace

Isa current_isa() { return setting().load(std::memory_order_relaxed); }

const char* isa_name(Isa isa) {
  static const char* const names[] = {"base", "avx2", "avx512"};
  return names[static_cast<int>(isa)];
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (int i = 0; i <= static_cast<int>(best()); ++i) names.push_back(isa_name(Isa(i)));
  return names;
}

void set_isa(const std::string& name) {
  if (name == "auto") return setting().store(best());
  for (int i = 0; i <= static_cast<int>(best()); ++i) {
    if (name == isa_name(Isa(i))) return setting().store(Isa(i));
  }
  throw std::invalid_argument("isa " + name + " is not available here; the best is " +
                              isa_name(best()));
}

}  // namespace fd
