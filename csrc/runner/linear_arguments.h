// What a product of rows with a matrix is told.
#pragma once

#include "runner/arguments.h"

namespace stratakv::STRATAKV_ISA {

// x: [n_inputs, n_columns], y: [n_inputs, n_rows], dense. `scratch` has `linear_floats` floats. Where `rounds_inputs`, x may
// be rounded to the matrix's type, in place.
struct LinearArguments {
  const Matrix& matrix;
  float* x;
  int n_inputs;
  float* y;
  int n_threads;
  float* scratch;
  bool rounds_inputs = false;

  int n_columns() const { return static_cast<int>(matrix.n_columns); }
};

}  // namespace stratakv::STRATAKV_ISA
