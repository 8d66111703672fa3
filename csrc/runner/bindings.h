#pragma once

#include <nanobind/nanobind.h>

namespace stratakv {

void bind_runner(nanobind::module_& m);

}  // namespace stratakv
