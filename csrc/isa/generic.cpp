#define STRATAKV_ISA generic
#include "isa/vec_generic.h"
#include "isa/table.inl"

namespace stratakv::STRATAKV_ISA {

bool is_supported() { return true; }

}  // namespace stratakv::STRATAKV_ISA
