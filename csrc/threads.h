// Threads by OpenMP: torch's own pool where torch is loaded, since both use the one libgomp.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

namespace stratakv {

template <typename Function>
void in_parallel(int n_threads, const Function& function) {
#ifdef _OPENMP
  if (n_threads > 1) {
#pragma omp parallel num_threads(n_threads)
    {
      for (int t = omp_get_thread_num(); t < n_threads; t += omp_get_num_threads()) function(t);
    }
    return;
  }
#endif
  for (int t = 0; t < n_threads; ++t) function(t);
}

}  // namespace stratakv
