// One forward of a decoder of the Llama family over pages: tokens in, logits out, K and V into the cache.
#pragma once

#include <cmath>
#include <cstddef>

#include "attention/append.inl"
#include "attention/attend.inl"
#include "isa/partial.h"
#include "runner/arguments.h"
#include "runner/elementwise.inl"
#include "runner/linear.inl"
#include "threads.h"

namespace stratakv::STRATAKV_ISA {

// Fewer rows than this are no work for a second thread.
constexpr int kRowsToShare = 8;

class Forwarding {
 public:
  Forwarding(const Model& model, const Forward& step)
      : model_(model),
        step_(step),
        n_rows_(step.n_sequences * step.n_new),
        n_wanted_rows_(step.n_sequences * step.n_wanted),
        q_numbers_(model.n_query_heads * model.head_dim),
        kv_numbers_(model.n_kv_heads * model.head_dim) {}

  void run() {
    each_row([&](int row) { embed(row); });
    for (int i = 0; i < model_.n_layers; ++i) {
      remember(i);
      if (i + 1 == model_.n_layers) keep_wanted_rows();
      if (n_rows_ == 0) return;
      attend(i);
      transform(i);
    }
    each_row([&](int row) { rms_norm(stream(row), model_.norm, model_.hidden, model_.norm_epsilon, normed(row, model_.hidden)); });
    product(model_.head, n_rows_, step_.logits);
    if (model_.logit_softcap > 0) each_row([&](int row) { cap(step_.logits + row * model_.head.n_rows); });
  }

  // Of the last so many new tokens of each sequence.
  AttentionArguments attention_arguments(int layer_index, int n_new) const {
    const Layer& layer = model_.layers[layer_index];
    const GroupRows& rows = step_.groups[layer.group];
    AttentionArguments a{};
    a.pages = {step_.slabs[layer_index], rows.table, rows.table_stride, layer.block_bytes, layer.k_page_bytes, layer.v_page_bytes,
               model_.n_kv_heads, rows.block_tokens, model_.head_dim, model_.head_dim, layer.k_type, layer.v_type};
    a.rows = {rows.counts, rows.skips, rows.first_positions, rows.positions};
    a.rules = {model_.attention_scale, model_.attention_softcap, 1, rows.window, rows.sinks, nullptr, nullptr};
    const std::int64_t token = q_numbers_ + 2 * kv_numbers_;
    a.query = {step_.produced + token * (step_.n_new - n_new), token * step_.n_new, model_.head_dim, token};
    a.out = {step_.normed, std::int64_t{q_numbers_} * n_new, model_.head_dim, q_numbers_};
    a.lse = {step_.lse, std::int64_t{model_.n_query_heads} * n_new, n_new, 1};
    a.query_type = NumberType::kFloat;
    a.query_positions = n_new == step_.n_new ? step_.positions : step_.wanted_positions;
    a.n_sequences = step_.n_sequences;
    a.group = model_.n_query_heads / model_.n_kv_heads;
    a.n_new = n_new;
    a.n_threads = step_.n_threads;
    a.prompt_queries = step_.prompt_queries;
    a.scratch = step_.scratch;
    return a;
  }

 private:
  template <typename Function>
  void each_row(int n, const Function& function) const {
    const int n_threads = n < kRowsToShare ? 1 : step_.n_threads;
    in_parallel(n_threads, [&](int thread) {
      for (int row = n * thread / n_threads; row < n * (thread + 1) / n_threads; ++row) function(row);
    });
  }

  template <typename Function>
  void each_row(const Function& function) const {
    each_row(n_rows_, function);
  }

  float* stream(int row) const { return step_.stream + std::ptrdiff_t{row} * model_.hidden; }
  float* normed(int row, int n) const { return step_.normed + std::ptrdiff_t{row} * n; }
  float* produced(int row, std::ptrdiff_t n) const { return step_.produced + row * n; }

  void embed(int row) const {
    const std::ptrdiff_t at = std::ptrdiff_t{step_.tokens[row]} * model_.hidden;
    switch (model_.embedding.type) {
      case NumberType::kFloat: embed(static_cast<const float*>(model_.embedding.data) + at, stream(row)); break;
      case NumberType::kBFloat: embed(static_cast<const BFloat*>(model_.embedding.data) + at, stream(row)); break;
      case NumberType::kHalf: embed(static_cast<const Half*>(model_.embedding.data) + at, stream(row)); break;
    }
  }

  template <typename T>
  void embed(const T* from, float* to) const {
    const Vec scale = Vec::all(model_.embedding_scale);
    for (int d = 0; d < model_.hidden; d += Vec::kWidth) {
      store_up_to(load_up_to(from + d, model_.hidden - d) * scale, to + d, model_.hidden - d);
    }
  }

  // From `normed` into `to`.
  void product(const Matrix& matrix, int n_rows, float* to) const {
    linear({matrix, step_.normed, n_rows, to, step_.n_threads, step_.scratch, model_.rounds_activations});
    if (matrix.bias != nullptr) {
      each_row(n_rows, [&](int row) { add(matrix.bias, static_cast<int>(matrix.n_rows), to + row * matrix.n_rows); });
    }
  }

  // Keys and values of all rows go into the cache; queries stay in `produced`.
  void remember(int index) const {
    const Layer& layer = model_.layers[index];
    each_row([&](int row) { rms_norm(stream(row), layer.attention_norm, model_.hidden, model_.norm_epsilon, normed(row, model_.hidden)); });
    product(layer.qkv, n_rows_, step_.produced);
    const AttentionArguments arguments = attention_arguments(index, step_.n_new);
    each_row([&](int row) { store(layer, arguments, row); });
  }

  // Behind the keys and values of the last layer nobody asks for rows whose logits are not wanted.
  void keep_wanted_rows() {
    if (n_wanted_rows_ == n_rows_) return;
    for (int i = 0; i < n_wanted_rows_; ++i) {  // a row never goes behind where it was
      const int row = i / step_.n_wanted * step_.n_new + step_.n_new - step_.n_wanted + i % step_.n_wanted;
      copy(stream(row), model_.hidden, stream(i));
    }
    n_rows_ = n_wanted_rows_;
  }

  void attend(int index) const {
    const Layer& layer = model_.layers[index];
    STRATAKV_ISA::attend(attention_arguments(index, n_rows_ / step_.n_sequences));
    product(layer.output, n_rows_, step_.produced);
    each_row([&](int row) { add_to_stream(layer.after_attention_norm, row); });
  }

  // Queries and keys are turned to their positions where they lie; keys and values go into their pages.
  void store(const Layer& layer, const AttentionArguments& arguments, int row) const {
    const int sequence = row / step_.n_new, token = row % step_.n_new;
    const int position = step_.positions[sequence] + token;
    float* const numbers = produced(row, q_numbers_ + 2 * kv_numbers_);
    for (int head = 0; head < model_.n_query_heads + model_.n_kv_heads; ++head) {
      float* const at = numbers + head * model_.head_dim;
      const float* norm = head < model_.n_query_heads ? layer.query_norm : layer.key_norm;
      if (norm != nullptr) rms_norm(at, norm, model_.head_dim, model_.norm_epsilon, at);
      if (layer.rotation >= 0) rotate(step_.rotations[layer.rotation], position, at);
    }
    const int place = arguments.rows.counts[sequence] - step_.n_new + token;
    for (int head = 0; head < model_.n_kv_heads; ++head) {
      const float* key = numbers + q_numbers_ + head * model_.head_dim;
      append_row(arguments.pages, sequence, head, place, key, key + kv_numbers_);
    }
  }

  void transform(int index) const {
    const Layer& layer = model_.layers[index];
    const int n = model_.intermediate;
    each_row([&](int row) { rms_norm(stream(row), layer.mlp_norm, model_.hidden, model_.norm_epsilon, normed(row, model_.hidden)); });
    product(layer.gate_up, n_rows_, step_.produced);
    each_row([&](int row) {
      const float* gates = produced(row, 2 * std::ptrdiff_t{n});
      gate(model_.activation, gates, gates + n, n, normed(row, n));
    });
    product(layer.down, n_rows_, step_.produced);
    each_row([&](int row) { add_to_stream(layer.after_mlp_norm, row); });
  }

  void add_to_stream(const float* norm, int row) const {
    float* const from = produced(row, model_.hidden);
    if (norm != nullptr) rms_norm(from, norm, model_.hidden, model_.norm_epsilon, from);
    add(from, model_.hidden, stream(row));
  }

  void cap(float* logits) const {
    for (std::ptrdiff_t i = 0; i < model_.head.n_rows; ++i) {
      logits[i] = model_.logit_softcap * std::tanh(logits[i] / model_.logit_softcap);
    }
  }

  const Model& model_;
  const Forward& step_;
  int n_rows_;
  const int n_wanted_rows_, q_numbers_, kv_numbers_;
};

inline void forward(const Model& model, const Forward& step) { Forwarding(model, step).run(); }

inline std::ptrdiff_t forward_floats(const Model& model, const Forward& step) {
  std::ptrdiff_t most = 0;
  const int widths[] = {model.hidden, model.intermediate, model.n_query_heads * model.head_dim};
  for (const int n_columns : widths) {
    most = larger(most, linear_floats(n_columns, step.n_sequences * step.n_new, step.n_threads));
  }
  for (int i = 0; i < model.n_layers; ++i) {
    const Forwarding forwarding(model, step);
    most = larger(most, attend_floats(forwarding.attention_arguments(i, step.n_new)));
    if (step.n_wanted > 0) most = larger(most, attend_floats(forwarding.attention_arguments(i, step.n_wanted)));
  }
  return most;
}

}  // namespace stratakv::STRATAKV_ISA
