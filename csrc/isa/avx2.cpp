#define STRATAKV_ISA avx2
#include "isa/vec_avx2.h"
#include "isa/table.inl"

namespace stratakv::STRATAKV_ISA {

bool is_supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

}  // namespace stratakv::STRATAKV_ISA
