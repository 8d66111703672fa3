// A decoder model and one forward of it, as plain data: addresses and sizes, checked by the caller.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace stratakv {

// [n_rows, n_columns]: y = x W^T + bias. By rows, or in tiles as tiled/linear.inl has them.
struct Matrix {
  const void* data;
  const float* bias;  // [n_rows], or null
  std::int64_t n_rows;
  std::int64_t n_columns;
  NumberType type;
  bool is_tiled;
};

// Where one layer's rows lie.
struct Strand {
  std::int32_t group;         // of the cache; -1: there is no such strand
  const std::int64_t* slabs;  // address of each slab's bytes of the layer
  std::int64_t block_bytes, k_page_bytes, v_page_bytes;
  NumberType k_type, v_type;
};

// Weights of RMS norms are null where the model has no such norm.
struct Layer {
  const float* attention_norm;      // [hidden]
  const float* query_norm;          // [head_dim]
  const float* key_norm;            // [head_dim]
  const float* after_attention_norm;  // [hidden]
  const float* mlp_norm;            // [hidden]
  const float* after_mlp_norm;      // [hidden]
  Matrix qkv;      // [(n_query_heads + 2 n_kv_heads) * head_dim, hidden]
  Matrix output;   // [hidden, n_query_heads * head_dim]
  Matrix gate_up;  // [2 * intermediate, hidden]: all gates, then all ups; in tiles, 16 of either in turn, filled up to 32
  Matrix down;     // [hidden, intermediate]
  std::int32_t rotation;  // which table of angles; -1: none
  // The rows of the cache's format, and those that are read in 16 bits in place of them. New rows go into both; keys that
  // are coded in groups of rows are the caller's to write.
  Strand strands[2];
};

enum class Activation : std::int32_t { kSilu = 0, kGeluTanh = 1 };

struct Model {
  std::int32_t hidden, intermediate, head_dim, n_query_heads, n_kv_heads;
  float norm_epsilon, embedding_scale, attention_scale;
  float attention_softcap, logit_softcap;  // 0: none
  Activation activation;
  // To bf16 where matrices are tiled: there, in prompts and as AttentionArguments::rounds says; and where matrices have 16 bits as
  // rounds_to_digit says. Else more bits are kept.
  bool rounds_activations;
  Matrix embedding, head;  // [vocabulary, hidden]. The head has the type of all matrices of the layers, and is tiled where they are
  const float* norm;       // [hidden]
  const Layer* layers;
  std::int32_t n_layers;
};

// The rows of one group of the cache in this step: what is read, and where new ones go.
struct GroupRows {
  const std::int32_t* table;  // [n_sequences, n_blocks, 2]: slab, block in the slab
  std::int64_t table_stride;
  const std::int32_t* counts;           // [n_sequences]
  const std::int32_t* skips;            // [n_sequences]
  const std::int32_t* first_positions;  // [n_sequences]: of row 0
  const std::int32_t* positions;        // as in Rows
  std::int32_t block_tokens, window, sinks;
  const std::int32_t* new_table;  // as `table`, from the block with the first new row on
  std::int64_t new_table_stride;
  std::int32_t new_row;           // in the new table, of the first new token
};

// Cosines and sines, [n_positions, pairs] each, of a head's numbers d and d + pairs.
struct Rotation {
  const float* cosines;
  const float* sines;
  std::int32_t pairs;
};

struct Forward {
  const std::int32_t* tokens;     // [n_sequences, n_new]
  const std::int32_t* positions;  // [n_sequences]: of the first new token
  std::int32_t n_sequences, n_new, n_threads;
  std::int64_t prompt_queries;    // as in AttentionArguments
  const GroupRows* groups;
  const Rotation* rotations;
  // Room, for n_sequences * n_new rows.
  float* stream;     // [rows, hidden]
  float* normed;     // [rows, max(hidden, n_query_heads * head_dim, intermediate)]: what goes into a product; in whole
                     // steps of 32 for tiled matrices
  float* produced;   // [rows, max(qkv rows, 2 * intermediate, hidden)]: what comes out; likewise
  float* lse;        // [n_sequences, n_query_heads, n_new]
  float* scratch;    // as many floats as the kernel asks for
  // The last so many new tokens of each sequence are those whose logits are wanted.
  std::int32_t n_wanted;
  const std::int32_t* wanted_positions;  // [n_sequences]: of the first of them
  float* logits;                         // [n_sequences, n_wanted, vocabulary]
};

}  // namespace stratakv
