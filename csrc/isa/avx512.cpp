#define STRATAKV_ISA avx512
#include "isa/vec_avx512.h"
#include "isa/table.inl"

namespace stratakv::STRATAKV_ISA {

bool is_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}

}  // namespace stratakv::STRATAKV_ISA
