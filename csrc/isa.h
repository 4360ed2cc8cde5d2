// Which instruction set the CPU kernels run with: the best this processor has, or a named one.
#pragma once
#include <string>
#include <vector>

namespace fd {

enum class Isa { kBase = 0, kAvx2 = 1, kAvx512 = 2 };

Isa current_isa();
const char* isa_name(Isa isa);
std::vector<std::string> usable_isas();

// Takes "base", "avx2", "avx512", or "auto" for the best. Throws std::invalid_argument where this
// processor or this build has no such one. For tests; one setting for the whole process.
void set_isa(const std::string& name);

}  // namespace fd

#if defined(__x86_64__)
#define FD_BY_ISA(function)                                           \
  (::fd::current_isa() == ::fd::Isa::kAvx512 ? ::fd::avx512::function \
   : ::fd::current_isa() == ::fd::Isa::kAvx2 ? ::fd::avx2::function   \
                                             : ::fd::base::function)
#else
#define FD_BY_ISA(function) ::fd::base::function
#endif
