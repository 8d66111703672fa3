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
#ifdef __AVX512BF16__
#include "tiled/linear.inl"
#endif

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
    each_row([&](int row) { norm_input(model_.norm, row); });
    product(model_.head, step_.normed, step_.logits);
    if (model_.logit_softcap > 0) each_row([&](int row) { cap(step_.logits + row * model_.head.n_rows); });
  }

  // function(the call for the last so many new tokens of each sequence).
  template <typename Function>
  void with_attention(const Layer& layer, int n_new, const Function& function) const {
    const Strand &own = layer.strands[0], &recent = layer.strands[1];
    if (recent.group < 0) return function(attention_arguments(own, n_new));
    AttentionArguments a = attention_arguments(recent, n_new);
    const AttentionArguments before = attention_arguments(own, n_new);
    if (before.rows.counts[0] > before.rows.skips[0]) a.before = &before;
    function(a);
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
  float* produced(int row, std::ptrdiff_t n) const { return step_.produced + row * n; }

  // Inputs of `n` numbers for a product.
  std::ptrdiff_t input_width(int n) const {
#ifdef __AVX512BF16__
    if (model_.head.is_tiled) return input_pitch(n);
#endif
    return n;
  }
  float* input(int row, int n) const { return step_.normed + row * input_width(n); }

  // What was written as fp32 becomes what products read.
  void settle([[maybe_unused]] float* input, [[maybe_unused]] int n) const {
#ifdef __AVX512BF16__
    if (model_.head.is_tiled) model_.rounds_activations ? settle_input<1>(input, n) : settle_input<kParts>(input, n);
#endif
  }

  void norm_input(const float* weight, int row) const {
    rms_norm(stream(row), weight, model_.hidden, model_.norm_epsilon, input(row, model_.hidden));
    settle(input(row, model_.hidden), model_.hidden);
  }

  void embed(int row) const {
#ifdef __AVX512BF16__
    if (model_.embedding.is_tiled) return copy_tiled_row(model_.embedding, step_.tokens[row], model_.embedding_scale, stream(row));
#endif
    const std::ptrdiff_t at = std::ptrdiff_t{step_.tokens[row]} * model_.hidden;
    switch (model_.embedding.type) {
      case NumberType::kFloat: embed(static_cast<const float*>(model_.embedding.data) + at, stream(row)); break;
      case NumberType::kBFloat: embed(static_cast<const BFloat*>(model_.embedding.data) + at, stream(row)); break;
      default: embed(static_cast<const Half*>(model_.embedding.data) + at, stream(row)); break;
    }
  }

  template <typename T>
  void embed(const T* from, float* to) const {
    const Vec scale = Vec::all(model_.embedding_scale);
    for (int d = 0; d < model_.hidden; d += Vec::kWidth) {
      store_up_to(load_up_to(from + d, model_.hidden - d) * scale, to + d, model_.hidden - d);
    }
  }

  void product(const Matrix& matrix, const float* x, float* to) const {
    if (!tiled_product(matrix, x, to, matrix.n_rows, false)) linear({matrix, x, n_rows_, to, step_.n_threads, step_.scratch});
    if (matrix.bias != nullptr) {
      each_row([&](int row) { add(matrix.bias, static_cast<int>(matrix.n_rows), to + row * matrix.n_rows); });
    }
  }

  // What comes out is added to the stream, behind the norm, if there is one. It may need `room`.
  void add_product(const Matrix& matrix, const float* x, const float* norm, float* room) const {
    if (norm == nullptr && matrix.bias == nullptr && tiled_product(matrix, x, step_.stream, model_.hidden, true)) return;
    product(matrix, x, room);
    each_row([&](int row) {
      float* const from = room + std::ptrdiff_t{row} * model_.hidden;
      if (norm != nullptr) rms_norm(from, norm, model_.hidden, model_.norm_epsilon, from);
      add(from, model_.hidden, stream(row));
    });
  }

  // Whether the matrix is tiled and the product was made.
  bool tiled_product([[maybe_unused]] const Matrix& matrix, [[maybe_unused]] const float* x, [[maybe_unused]] float* y,
                     [[maybe_unused]] std::ptrdiff_t pitch, [[maybe_unused]] bool adds) const {
#ifdef __AVX512BF16__
    if (matrix.is_tiled) {
      tiled(matrix, x, TiledOutput{y, pitch, matrix.n_rows, adds});
      return true;
    }
#endif
    return false;
  }

#ifdef __AVX512BF16__
  template <typename Output>
  void tiled(const Matrix& matrix, const float* x, const Output& out) const {
    if (model_.rounds_activations) linear_tiled<1>(matrix, x, n_rows_, step_.n_threads, out);
    else linear_tiled<kParts>(matrix, x, n_rows_, step_.n_threads, out);
  }
#endif

  Pages pages_of(const Strand& strand, const std::int32_t* table, std::int64_t table_stride) const {
    return {strand.slabs, table, table_stride, strand.block_bytes, strand.k_page_bytes, strand.v_page_bytes, model_.n_kv_heads,
            step_.groups[strand.group].block_tokens, model_.head_dim, model_.head_dim, strand.k_type, strand.v_type};
  }

  AttentionArguments attention_arguments(const Strand& strand, int n_new) const {
    const GroupRows& rows = step_.groups[strand.group];
    AttentionArguments a{};
    a.pages = pages_of(strand, rows.table, rows.table_stride);
    a.rows = {rows.counts, rows.skips, rows.first_positions, rows.positions};
    a.rules = {model_.attention_scale, model_.attention_softcap, 1, rows.window, rows.sinks, nullptr, nullptr};
    const std::int64_t token = q_numbers_ + 2 * kv_numbers_;
    a.query = {step_.produced + token * (step_.n_new - n_new), token * step_.n_new, model_.head_dim, token};
    const std::int64_t width = input_width(q_numbers_);
    a.out = {step_.normed, width * n_new, model_.head_dim, width};
    a.lse = {step_.lse, std::int64_t{model_.n_query_heads} * n_new, n_new, 1};
    a.query_type = NumberType::kFloat;
    a.query_positions = n_new == step_.n_new ? step_.positions : step_.wanted_positions;
    a.n_sequences = step_.n_sequences;
    a.group = model_.n_query_heads / model_.n_kv_heads;
    a.n_new = n_new;
    a.n_threads = step_.n_threads;
    a.rounds = model_.rounds_activations && model_.head.is_tiled;
    // Who has weights in fp32 wants more than 16 bits can tell.
    a.rounds_to_digit = model_.rounds_activations && model_.head.type != NumberType::kFloat;
    a.prompt_queries = step_.prompt_queries;
    a.scratch = step_.scratch;
    return a;
  }

  // Keys and values of all rows go into the cache; queries stay in `produced`.
  void remember(int index) const {
    const Layer& layer = model_.layers[index];
    each_row([&](int row) { norm_input(layer.attention_norm, row); });
    product(layer.qkv, step_.normed, step_.produced);
    each_row([&](int row) { store(layer, row); });
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
    with_attention(layer, n_rows_ / step_.n_sequences, [](const AttentionArguments& a) { STRATAKV_ISA::attend(a); });
    if (model_.head.is_tiled) each_row([&](int row) { settle(input(row, q_numbers_), q_numbers_); });
    add_product(layer.output, step_.normed, layer.after_attention_norm, step_.produced);
  }

  // Queries and keys are turned to their positions where they lie; keys and values go into their pages.
  void store(const Layer& layer, int row) const {
    const int sequence = row / step_.n_new, token = row % step_.n_new;
    const int position = step_.positions[sequence] + token;
    float* const numbers = produced(row, q_numbers_ + 2 * kv_numbers_);
    for (int head = 0; head < model_.n_query_heads + model_.n_kv_heads; ++head) {
      float* const at = numbers + head * model_.head_dim;
      const float* norm = head < model_.n_query_heads ? layer.query_norm : layer.key_norm;
      if (norm != nullptr) rms_norm(at, norm, model_.head_dim, model_.norm_epsilon, at);
      if (layer.rotation >= 0) rotate(step_.rotations[layer.rotation], position, at);
    }
    for (const Strand& strand : layer.strands) {
      if (strand.group < 0) continue;
      const GroupRows& rows = step_.groups[strand.group];
      const Pages pages = pages_of(strand, rows.new_table, rows.new_table_stride);
      for (int head = 0; head < model_.n_kv_heads; ++head) {
        const float* key = numbers + q_numbers_ + head * model_.head_dim;
        append_row(pages, sequence, head, rows.new_row + token, key, key + kv_numbers_);
      }
    }
  }

  void transform(int index) const {
    const Layer& layer = model_.layers[index];
    each_row([&](int row) { norm_input(layer.mlp_norm, row); });
#ifdef __AVX512BF16__
    if (layer.gate_up.is_tiled) {
      tiled(layer.gate_up, step_.normed, GatedOutput{step_.produced, model_.intermediate, model_.activation, layer.gate_up.bias});
      return add_product(layer.down, step_.produced, layer.after_mlp_norm, step_.normed);
    }
#endif
    product(layer.gate_up, step_.normed, step_.produced);
    const int n = model_.intermediate;
    each_row([&](int row) {
      const float* gates = produced(row, 2 * std::ptrdiff_t{n});
      gate(model_.activation, gates, gates + n, n, input(row, n));
    });
    add_product(layer.down, step_.normed, layer.after_mlp_norm, step_.produced);
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
    if (!model.head.is_tiled) most = larger(most, linear_floats(n_columns, step.n_sequences * step.n_new, step.n_threads));
  }
  const Forwarding forwarding(model, step);
  const auto take = [&](const AttentionArguments& a) { most = larger(most, attend_floats(a)); };
  for (int i = 0; i < model.n_layers; ++i) {
    forwarding.with_attention(model.layers[i], step.n_new, take);
    if (step.n_wanted > 0) forwarding.with_attention(model.layers[i], step.n_wanted, take);
  }
  return most;
}

}  // namespace stratakv::STRATAKV_ISA
