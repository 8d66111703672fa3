// Memory for a kernel's intermediate results.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace stratakv {

// Grows as asked, and begins on a line of the processor's caches, so that no register or row of a tile lies on two.
class Room {
 public:
  float* floats(std::ptrdiff_t n) {
    constexpr std::size_t line = 64;
    const std::size_t wanted = static_cast<std::size_t>(n) + line / sizeof(float);
    if (floats_.size() < wanted) floats_.resize(wanted);
    void* begin = floats_.data();
    std::size_t space = floats_.size() * sizeof(float);
    return static_cast<float*>(std::align(line, n * sizeof(float), begin, space));
  }

 private:
  std::vector<float> floats_;
};

}  // namespace stratakv
