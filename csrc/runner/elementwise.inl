// What happens to the rows between the products: norms, rotations, activations.
#pragma once

#include <cmath>
#include <cstddef>

#include "isa/exponential.h"
#include "isa/partial.h"
#include "isa/small.h"
#include "runner/arguments.h"

namespace stratakv::STRATAKV_ISA {

// y = x / sqrt(mean(x^2) + epsilon) * weight (Zhang and Sennrich 2019). y may be x.
inline void rms_norm(const float* x, const float* weight, int n, float epsilon, float* y) {
  Vec squares = Vec::zero();
  for (int i = 0; i < n; i += Vec::kWidth) {
    const Vec v = load_up_to(x + i, n - i);
    squares = Vec::fma(v, v, squares);
  }
  const Vec scale = Vec::all(1.0f / std::sqrt(squares.sum() / static_cast<float>(n) + epsilon));
  for (int i = 0; i < n; i += Vec::kWidth) {
    const int some = n - i;
    store_up_to(load_up_to(x + i, some) * scale * load_up_to(weight + i, some), y + i, some);
  }
}

// Rotary position embedding (Su et al. 2021) of one head in place: d and d + pairs turn together.
inline void rotate(const Rotation& rotation, int position, float* head) {
  const int pairs = rotation.pairs;
  const float* cosines = rotation.cosines + std::ptrdiff_t{position} * pairs;
  const float* sines = rotation.sines + std::ptrdiff_t{position} * pairs;
  for (int d = 0; d < pairs; d += Vec::kWidth) {
    const int some = pairs - d;
    const Vec a = load_up_to(head + d, some), b = load_up_to(head + pairs + d, some);
    const Vec cosine = load_up_to(cosines + d, some), sine = load_up_to(sines + d, some);
    store_up_to(a * cosine - b * sine, head + d, some);
    store_up_to(Vec::fma(b, cosine, a * sine), head + pairs + d, some);
  }
}

// x += y
inline void add(const float* y, int n, float* x) {
  for (int i = 0; i < n; i += Vec::kWidth) store_up_to(load_up_to(x + i, n - i) + load_up_to(y + i, n - i), x + i, n - i);
}

// 1 / (1 + e^-x)
inline Vec sigmoid(Vec x) {
  const Vec small = exponential(Vec::zero() - Vec::max(Vec::zero() - x, x));  // e^-|x|
  const Vec share = Vec::all(1.0f) / (Vec::all(1.0f) + small);
  const Vec other = small * share;
  return Vec::zero_where_less(x, Vec::zero(), share) + (other - Vec::zero_where_less(x, Vec::zero(), other));
}

inline Vec activated(Activation activation, Vec x) {
  if (activation == Activation::kSilu) return x * sigmoid(x);
  // GELU by tanh (Hendrycks and Gimpel 2016); (1 + tanh u) / 2 is sigmoid(2 u).
  const Vec cube = x * x * x;
  return x * sigmoid(Vec::fma(cube, Vec::all(0.044715f), x) * Vec::all(1.5957691216f));
}

// y = activation(gates) * ups
inline void gate(Activation activation, const float* gates, const float* ups, int n, float* y) {
  for (int i = 0; i < n; i += Vec::kWidth) {
    const int some = n - i;
    store_up_to(activated(activation, load_up_to(gates + i, some)) * load_up_to(ups + i, some), y + i, some);
  }
}

}  // namespace stratakv::STRATAKV_ISA
