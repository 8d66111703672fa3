// The table of one instruction set. Included once a file, with STRATAKV_ISA and Vec defined.
#include "attention/append.inl"
#include "attention/attend.inl"
#include "kernels.h"
#include "runner/forward.inl"

#define STRATAKV_TEXT(name) #name
#define STRATAKV_TEXT_OF(name) STRATAKV_TEXT(name)

namespace stratakv::STRATAKV_ISA {

bool is_supported();

#ifdef __AVX512BF16__
constexpr bool kTilesBf16 = true;
#else
constexpr bool kTilesBf16 = false;
#endif

extern const Kernels kernels;
const Kernels kernels{STRATAKV_TEXT_OF(STRATAKV_ISA), kTilesBf16, is_supported, is_prompt, attend, attend_floats, append,
                      forward, forward_floats};

}  // namespace stratakv::STRATAKV_ISA
