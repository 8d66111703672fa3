// What a product of rows with a matrix is told.
#pragma once

#include "runner/arguments.h"

namespace stratakv::STRATAKV_ISA {

// x: [n_inputs, n_columns], y: [n_inputs, n_rows], dense. `scratch` has `linear_floats` floats.
struct LinearArguments {
  const Matrix& matrix;
  const float* x;
  int n_inputs;
  float* y;
  int n_threads;
  float* scratch;

  int n_columns() const { return static_cast<int>(matrix.n_columns); }
};

}  // namespace stratakv::STRATAKV_ISA
