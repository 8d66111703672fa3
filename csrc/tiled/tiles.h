// Products of bf16 tiles with sums in fp32: by tile registers where the processor has them. Each thread has `Tiles` of its own:
//
//   kSplitsPay        whether products of numbers in two parts are faster than those of fp32
//   kInputs           inputs of a product with a matrix, at most
//   have_rows(n)      products have so many rows, at most 32, which is how many they have at first
//   multiply<parts of rows, parts of panels>(factors, sums, adds)
//                     the product of the rows with both panels is written, or added to what is there
#pragma once

#ifdef __AMX_BF16__
#include "tiled/amx.h"
#else
#include "tiled/bf16.h"
#endif
