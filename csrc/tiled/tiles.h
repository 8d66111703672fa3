// Products of bf16 tiles with sums in fp32: by tile registers where the processor has them.
#pragma once

#ifdef __AMX_BF16__
#include "tiled/amx.h"
#else
#include "tiled/bf16.h"
#endif
