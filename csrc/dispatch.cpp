#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace stratakv {

#if defined(__x86_64__)
namespace amx {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}
namespace avx512_vnni {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels kernels;
}
#endif
namespace generic {
extern const Kernels kernels;
}

const Kernels* const* compiled_kernels(std::size_t& count) {
  static const Kernels* const all[] = {
#if defined(__x86_64__)
      &amx::kernels,
      &avx512_bf16::kernels,
      &avx512_vnni::kernels,
      &avx512::kernels,
      &avx2::kernels,
#elif defined(__aarch64__)
      &neon::kernels,
#endif
      &generic::kernels,
  };
  count = sizeof all / sizeof all[0];
  return all;
}

const Kernels& kernels_of(const char* isa) {
  std::size_t count = 0;
  const Kernels* const* all = compiled_kernels(count);
  for (std::size_t i = 0; i < count; ++i) {
    if (std::strcmp(all[i]->isa, isa) == 0 && all[i]->is_supported()) return *all[i];
  }
  throw std::invalid_argument(std::string("this processor has no ") + isa);
}

}  // namespace stratakv
