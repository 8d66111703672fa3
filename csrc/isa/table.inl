// The table of one instruction set. Included once a file, with STRATAKV_ISA and Vec defined.
#include "attention/decode.inl"
#include "attention/prefill.inl"
#include "kernels.h"

#define STRATAKV_TEXT(name) #name
#define STRATAKV_TEXT_OF(name) STRATAKV_TEXT(name)

namespace stratakv::STRATAKV_ISA {

bool is_supported();

extern const Kernels kernels;
const Kernels kernels{STRATAKV_TEXT_OF(STRATAKV_ISA), is_supported, decode, decode_floats, prefill, prefill_floats};

}  // namespace stratakv::STRATAKV_ISA
