#include "kernels.h"

namespace stratakv {

#if defined(__x86_64__)
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
#endif
namespace generic {
extern const Kernels kernels;
}

const Kernels* const* compiled_kernels(std::size_t& count) {
  static const Kernels* const all[] = {
#if defined(__x86_64__)
      &avx512::kernels,
      &avx2::kernels,
#endif
      &generic::kernels,
  };
  count = sizeof all / sizeof all[0];
  return all;
}

}  // namespace stratakv
