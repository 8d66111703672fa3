#ifdef __aarch64__  // which 32-bit programs on such a processor are not
#define STRATAKV_ISA neon
#include "isa/vec_neon.h"
#include "isa/table.inl"

namespace stratakv::STRATAKV_ISA {

bool is_supported() { return true; }

}  // namespace stratakv::STRATAKV_ISA
#endif
