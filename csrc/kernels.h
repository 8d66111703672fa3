// The kernels of one instruction set, and the choice among those that were compiled.
#pragma once

#include <cstddef>

#include "attention/arguments.h"
#include "runner/arguments.h"

namespace stratakv {

struct Kernels {
  const char* isa;
  bool tiles_bf16;         // whether products with bf16 matrices want them in tiles
  bool (*is_supported)();  // by this processor
  bool (*is_prompt)(const AttentionArguments&);  // whether the kernel for prompts takes the call
  void (*attend)(const AttentionArguments&);
  std::ptrdiff_t (*attend_floats)(const AttentionArguments&);  // of scratch
  void (*append)(const AppendArguments&);
  void (*forward)(const Model&, const Forward&);
  std::ptrdiff_t (*forward_floats)(const Model&, const Forward&);
};

// All that were compiled in, best first; the last runs everywhere.
const Kernels* const* compiled_kernels(std::size_t& count);

// Throws std::invalid_argument where this processor cannot run them.
const Kernels& kernels_of(const char* isa);

}  // namespace stratakv
