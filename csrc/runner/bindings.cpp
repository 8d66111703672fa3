// The decoder as Python sees it: addresses and sizes in, numbers written where they were asked for. Callers check, and
// keep alive what they gave addresses of.
#include "runner/bindings.h"

#include <nanobind/stl/string.h>

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "room.h"
#include "runner/arguments.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace stratakv {
namespace {

template <typename T>
const T* at(std::intptr_t address) {
  return reinterpret_cast<const T*>(address);
}

class Decoder {
 public:
  Decoder(const std::string& isa, int hidden, int intermediate, int head_dim, int n_query_heads, int n_kv_heads, float norm_epsilon,
          float embedding_scale, float attention_scale, float attention_softcap, float logit_softcap, int activation,
          bool rounds_activations, const Matrix& embedding, const Matrix& head, std::intptr_t norm, int n_groups)
      : kernels_(&kernels_of(isa.c_str())), groups_(n_groups) {
    model_.hidden = hidden;
    model_.intermediate = intermediate;
    model_.head_dim = head_dim;
    model_.n_query_heads = n_query_heads;
    model_.n_kv_heads = n_kv_heads;
    model_.norm_epsilon = norm_epsilon;
    model_.embedding_scale = embedding_scale;
    model_.attention_scale = attention_scale;
    model_.attention_softcap = attention_softcap;
    model_.logit_softcap = logit_softcap;
    model_.activation = static_cast<Activation>(activation);
    model_.rounds_activations = rounds_activations;
    model_.embedding = embedding;
    model_.head = head;
    model_.norm = at<float>(norm);
  }

  void add_layer(const Matrix& qkv, const Matrix& output, const Matrix& gate_up, const Matrix& down, std::intptr_t attention_norm,
                 std::intptr_t query_norm, std::intptr_t key_norm, std::intptr_t after_attention_norm, std::intptr_t mlp_norm,
                 std::intptr_t after_mlp_norm, int rotation) {
    layers_.push_back({at<float>(attention_norm), at<float>(query_norm), at<float>(key_norm), at<float>(after_attention_norm),
                       at<float>(mlp_norm), at<float>(after_mlp_norm), qkv, output, gate_up, down, rotation, {}});
    for (Strand& strand : layers_.back().strands) strand.group = -1;
  }

  void set_pages(int layer, int strand, int group, std::intptr_t slabs, std::int64_t block_bytes, std::int64_t k_page_bytes,
                 std::int64_t v_page_bytes, int k_type, int v_type) {
    layers_[layer].strands[strand] = {group, at<std::int64_t>(slabs), block_bytes, k_page_bytes, v_page_bytes,
                                      static_cast<NumberType>(k_type), static_cast<NumberType>(v_type)};
  }

  void set_group(int group, std::intptr_t table, std::int64_t table_stride, std::intptr_t counts, std::intptr_t skips,
                 std::intptr_t first_positions, std::intptr_t positions, int block_tokens, int window, int sinks, std::intptr_t new_table,
                 std::int64_t new_table_stride, int new_row) {
    groups_[group] = {at<std::int32_t>(table), table_stride, at<std::int32_t>(counts), at<std::int32_t>(skips),
                      at<std::int32_t>(first_positions), at<std::int32_t>(positions), block_tokens, window, sinks,
                      at<std::int32_t>(new_table), new_table_stride, new_row};
  }

  void set_rotation(int index, std::intptr_t cosines, std::intptr_t sines, int pairs) {
    if (static_cast<int>(rotations_.size()) <= index) rotations_.resize(index + 1);
    rotations_[index] = {at<float>(cosines), at<float>(sines), pairs};
  }

  void set_room(std::intptr_t stream, std::intptr_t normed, std::intptr_t produced, std::intptr_t lse) {
    step_.stream = reinterpret_cast<float*>(stream);
    step_.normed = reinterpret_cast<float*>(normed);
    step_.produced = reinterpret_cast<float*>(produced);
    step_.lse = reinterpret_cast<float*>(lse);
  }

  void forward(std::intptr_t tokens, std::intptr_t positions, int n_sequences, int n_new, int n_wanted, std::intptr_t wanted_positions,
               std::intptr_t logits, int n_threads, std::int64_t prompt_queries) {
    model_.layers = layers_.data();
    model_.n_layers = static_cast<std::int32_t>(layers_.size());
    step_.tokens = at<std::int32_t>(tokens);
    step_.positions = at<std::int32_t>(positions);
    step_.n_sequences = n_sequences;
    step_.n_new = n_new;
    step_.n_threads = n_threads;
    step_.prompt_queries = prompt_queries;
    step_.groups = groups_.data();
    step_.rotations = rotations_.data();
    step_.n_wanted = n_wanted;
    step_.wanted_positions = at<std::int32_t>(wanted_positions);
    step_.logits = reinterpret_cast<float*>(logits);
    step_.scratch = room_.floats(kernels_->forward_floats(model_, step_));
    nb::gil_scoped_release release;
    kernels_->forward(model_, step_);
  }

 private:
  const Kernels* kernels_;
  Model model_{};
  Forward step_{};
  std::vector<Layer> layers_;
  std::vector<GroupRows> groups_;
  std::vector<Rotation> rotations_;
  Room room_;
};

}  // namespace

void bind_runner(nb::module_& m) {
  nb::class_<Matrix>(m, "Matrix")
      .def("__init__",
           [](Matrix* self, std::intptr_t data, std::int64_t n_rows, std::int64_t n_columns, int type, std::intptr_t bias, bool is_tiled) {
             new (self) Matrix{at<void>(data), at<float>(bias), n_rows, n_columns, static_cast<NumberType>(type), is_tiled};
           },
           "data"_a, "n_rows"_a, "n_columns"_a, "type"_a, "bias"_a, "is_tiled"_a);
  nb::class_<Decoder>(m, "Decoder")
      .def(nb::init<const std::string&, int, int, int, int, int, float, float, float, float, float, int, bool, const Matrix&, const Matrix&,
                    std::intptr_t, int>(),
           "isa"_a, "hidden"_a, "intermediate"_a, "head_dim"_a, "n_query_heads"_a, "n_kv_heads"_a, "norm_epsilon"_a,
           "embedding_scale"_a, "attention_scale"_a, "attention_softcap"_a, "logit_softcap"_a, "activation"_a, "rounds_activations"_a, "embedding"_a,
           "head"_a, "norm"_a, "n_groups"_a)
      .def("add_layer", &Decoder::add_layer, "qkv"_a, "output"_a, "gate_up"_a, "down"_a, "attention_norm"_a, "query_norm"_a,
           "key_norm"_a, "after_attention_norm"_a, "mlp_norm"_a, "after_mlp_norm"_a, "rotation"_a)
      .def("set_pages", &Decoder::set_pages)
      .def("set_group", &Decoder::set_group)
      .def("set_rotation", &Decoder::set_rotation)
      .def("set_room", &Decoder::set_room)
      .def("forward", &Decoder::forward);
}

}  // namespace stratakv
