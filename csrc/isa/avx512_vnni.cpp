#define STRATAKV_ISA avx512_vnni
#include "isa/vec_avx512.h"
#include "isa/table.inl"

namespace stratakv::STRATAKV_ISA {

bool is_supported() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

}  // namespace stratakv::STRATAKV_ISA
