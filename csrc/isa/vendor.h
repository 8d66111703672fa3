// Processors with AVX-512 differ by vendor in how memory is best read. Others are alike, as far as they were measured.
#pragma once

namespace stratakv::STRATAKV_ISA {

inline bool is_wide_intel() {
#ifdef __AVX512F__
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

inline bool is_wide_amd() {
#ifdef __AVX512F__
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

}  // namespace stratakv::STRATAKV_ISA
