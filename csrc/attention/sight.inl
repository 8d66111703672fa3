// What the queries of one sequence see of its rows, and how that shapes their scores.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention/arguments.h"
#include "isa/exponential.h"
#include "isa/small.h"

namespace stratakv::STRATAKV_ISA {

constexpr float kMinusInfinity = -__builtin_inff();
// A quarter of the smallest float: masks mark what is hidden with that number, or half of it. A bias hides by infinity.
constexpr float kHidden = -8.5e37f;
constexpr float kSmallest = -3.40282347e38f;

// One of a sequence's queries.
struct Query {
  std::int32_t token;   // of the new ones
  std::ptrdiff_t head;  // of the query heads
};

// Rows [from, to).
struct Span {
  int from, to;

  bool is_empty() const { return from >= to; }
};

class Sight {
 public:
  Sight(const AttentionArguments& a, int sequence)
      : rules_(a.rules),
        mask_(a.mask),
        first_query_(a.query_positions[sequence]),
        first_position_(a.rows.first_positions[sequence]),
        positions_(a.rows.positions),
        rows_{a.rows.skips[sequence], a.rows.counts[sequence]},
        hidden_below_(a.mask.kind == MaskKind::kBias ? kSmallest : kHidden),
        mask_at_(sequence * a.mask.tensor.sequence_stride - a.mask.offset) {}

  std::int32_t position_of(int row) const { return positions_ != nullptr ? positions_[row] : first_position_ + row; }
  std::int32_t position_of(Query query) const { return first_query_ + query.token; }

  // A token may see the rows before this one,
  int end(int token) const { return rules_.is_causal ? row_at(std::int64_t{first_query_} + token + 1) : rows_.to; }

  // but for those that have left its window.
  Span gone(int token) const {
    if (rules_.window == 0) return {rows_.from, rows_.from};
    return {row_at(rules_.sinks), row_at(std::int64_t{first_query_} + token - rules_.window + 1)};
  }

  // The shortest span of rows, counted from `row`, that holds all that the query sees of the `n` rows from there on.
  Span seen(Query query, int row, int n) const {
    Span span{0, smaller(n, end(query.token) - row)};
    const Span hidden = gone(query.token);
    if (hidden.from <= row) span.from = larger(0, hidden.to - row);
    if (mask_.kind != MaskKind::kNone) {
      while (!span.is_empty() && is_masked(query, row + span.from)) ++span.from;
      while (!span.is_empty() && is_masked(query, row + span.to - 1)) --span.to;
    }
    return span;
  }

  // Softcap, ALiBi, mask, and what the query does not see. `scores` has room for whole registers.
  void shape(Query query, int row, int n, float* scores) const {
    const std::int32_t at = position_of(query);
    if (rules_.softcap > 0) {
      const Vec cap = Vec::all(rules_.softcap), part = Vec::all(1.0f / rules_.softcap);
      for (int r = 0; r < n; r += Vec::kWidth) (cap * hyperbolic_tangent(Vec::load(scores + r) * part)).store(scores + r);
    }
    if (rules_.slopes != nullptr) {
      const float slope = rules_.slopes[query.head];
      each(row, n, [=](int r, std::int32_t position) { scores[r] += slope * static_cast<float>(position - at); });
    }
    if (mask_.kind != MaskKind::kNone) mask(query, row, n, scores);
    if (rules_.is_causal && position_of(row + n - 1) > at) hide({end(query.token), row + n}, row, n, scores);
    if (rules_.window > 0 && position_of(row) <= at - rules_.window) hide(gone(query.token), row, n, scores);
  }

 private:
  // The first row at `position` or later.
  int row_at(std::int64_t position) const {
    if (positions_ == nullptr) return static_cast<int>(between<std::int64_t>(position - first_position_, rows_.from, rows_.to));
    int low = rows_.from, high = rows_.to;
    while (low < high) {
      const int middle = low + (high - low) / 2;
      if (positions_[middle] < position) low = middle + 1; else high = middle;
    }
    return low;
  }

  static void hide(Span rows, int row, int n, float* scores) {
    for (int r = larger(rows.from - row, 0); r < smaller(rows.to - row, n); ++r) scores[r] = kMinusInfinity;
  }

  std::ptrdiff_t mask_start(Query query) const {
    return mask_at_ + query.head * mask_.tensor.head_stride + query.token * mask_.tensor.token_stride;
  }

  bool is_masked(Query query, int row) const {
    const std::ptrdiff_t column = mask_start(query) + position_of(row);
    if (mask_.kind == MaskKind::kBool) return !static_cast<const unsigned char*>(mask_.tensor.data)[column];
    return static_cast<const float*>(mask_.tensor.data)[column] < hidden_below_;
  }

  void mask(Query query, int row, int n, float* scores) const {
    const std::ptrdiff_t start = mask_start(query);
    if (mask_.kind == MaskKind::kBool) {
      const unsigned char* shown = static_cast<const unsigned char*>(mask_.tensor.data);
      each(row, n, [=](int r, std::int32_t at) { scores[r] = shown[start + at] ? scores[r] : kMinusInfinity; });
    } else {
      const float* table = static_cast<const float*>(mask_.tensor.data);
      each(row, n, [=, limit = hidden_below_](int r, std::int32_t at) {
        const float added = table[start + at];
        scores[r] = added < limit ? kMinusInfinity : scores[r] + added;
      });
    }
  }

  // function(r, position of row + r), in a loop of its own where positions are consecutive: compilers then use registers.
  template <typename Function>
  void each(int row, int n, const Function& function) const {
    if (positions_ == nullptr) {
      for (int r = 0; r < n; ++r) function(r, first_position_ + row + r);
    } else {
      for (int r = 0; r < n; ++r) function(r, positions_[row + r]);
    }
  }

  const Rules& rules_;
  const Mask& mask_;
  std::int32_t first_query_, first_position_;
  const std::int32_t* positions_;
  Span rows_;
  float hidden_below_;
  std::ptrdiff_t mask_at_;
};

}  // namespace stratakv::STRATAKV_ISA
