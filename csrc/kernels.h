// The kernels of one instruction set, and the choice among those that were compiled.
#pragma once

#include <cstddef>

#include "attention/arguments.h"

namespace stratakv {

struct Kernels {
  const char* isa;
  bool (*is_supported)();  // by this processor
  void (*decode)(const AttentionArguments&);
  std::ptrdiff_t (*decode_floats)(const AttentionArguments&);  // of scratch
  void (*prefill)(const AttentionArguments&);  // the same for many queries
  std::ptrdiff_t (*prefill_floats)(const AttentionArguments&);
};

// All that were compiled in, best first; the last runs everywhere.
const Kernels* const* compiled_kernels(std::size_t& count);

}  // namespace stratakv
