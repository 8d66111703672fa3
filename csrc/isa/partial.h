// Loads and stores of a whole register, or of what is left of a row.
#pragma once

namespace stratakv::STRATAKV_ISA {

// The first `n` numbers, at most a register's; the rest are zeros.
template <typename T>
inline Vec load_up_to(const T* p, int n) {
  return n >= Vec::kWidth ? Vec::load(p) : Vec::load_some(p, n);
}

template <typename T>
inline void store_up_to(Vec value, T* p, int n) {
  if (n >= Vec::kWidth) value.store(p); else value.store_some(p, n);
}

}  // namespace stratakv::STRATAKV_ISA
