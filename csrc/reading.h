// How fast memory can be read: every word once, by all threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "threads.h"

namespace stratakv {

inline std::uint64_t read_all(const std::uint64_t* words, std::ptrdiff_t n, int n_threads) {
  std::uint64_t total = 0;
  in_parallel(n_threads, [&](int thread) {
    const std::ptrdiff_t from = n * thread / n_threads, to = n * (thread + 1) / n_threads;
    std::uint64_t sums[8] = {};
    std::ptrdiff_t i = from;
    for (; i + 8 <= to; i += 8) {
      for (int k = 0; k < 8; ++k) sums[k] += words[i + k];
    }
    for (; i < to; ++i) sums[0] += words[i];
    std::uint64_t sum = 0;
    for (std::uint64_t each : sums) sum += each;
#pragma omp atomic
    total += sum;
  });
  return total;
}

}  // namespace stratakv
