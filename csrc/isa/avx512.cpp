#define STRATAKV_ISA avx512
#include "isa/vec_avx512.h"
#include "isa/table.inl"

namespace stratakv::STRATAKV_ISA {

bool is_supported() { return has_avx512(); }

}  // namespace stratakv::STRATAKV_ISA
