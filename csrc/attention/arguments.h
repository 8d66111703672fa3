// What a call of an attention kernel is told. Plain data: addresses, strides and sizes, checked by the caller.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace stratakv {

// One member's pages, and which of them hold the rows of which sequence.
struct Pages {
  const std::int64_t* slabs;   // address of each slab's bytes for this member
  const std::int32_t* table;   // [n_sequences, n_blocks, 2]: slab, block in the slab
  std::int64_t table_stride;   // numbers from one sequence to the next
  std::int64_t block_bytes;    // from one block of a slab to the next
  std::int64_t k_page_bytes;   // one KV head's keys in a block; the pages of the heads lie side by side
  std::int64_t v_page_bytes;   // likewise its values, behind all keys
  std::int32_t n_heads;        // KV heads
  std::int32_t block_tokens;   // rows in a page
  std::int32_t k_dim;
  std::int32_t v_dim;
  NumberType k_type;
  NumberType v_type;
};

// The rows of each sequence. Row r stands for position first_positions[s] + r, or positions[r].
struct Rows {
  const std::int32_t* counts;           // [n_sequences]: rows, those to skip included
  const std::int32_t* skips;            // [n_sequences]: rows at the start that nobody sees
  const std::int32_t* first_positions;  // [n_sequences]
  const std::int32_t* positions;        // rising, the same for all sequences; or null where they are consecutive
};

// A tensor [n_sequences, n_query_heads, n_new, dim]; dim is dense, the strides count numbers.
template <typename Pointer>
struct HeadTensor {
  Pointer data;
  std::int64_t sequence_stride;
  std::int64_t head_stride;
  std::int64_t token_stride;
};

// kBool: true is seen. kFloat: added, and what is near the smallest float hides. kBias: added, and only that.
enum class MaskKind : std::int32_t { kNone = 0, kBool = 1, kFloat = 2, kBias = 3 };

struct Mask {
  HeadTensor<const void*> tensor;
  MaskKind kind;
  std::int32_t offset;  // the position of the first column
};

struct Rules {
  float scale;
  float softcap;           // 0: none
  std::int32_t is_causal;
  std::int32_t window;     // a query sees this many positions, its own included; 0: all
  std::int32_t sinks;      // and the first so many
  const float* slopes;     // [n_query_heads], ALiBi: slope * (row's position - query's position) is added; or null
  const float* head_sinks; // [n_query_heads]: a score that takes part in the softmax without a value; or null
};

struct AttentionArguments {
  Pages pages;
  Rows rows;
  Rules rules;
  Mask mask;
  HeadTensor<const void*> query;
  HeadTensor<void*> out;      // in the query's type
  HeadTensor<float*> lse;     // its token stride is the distance of the numbers
  NumberType query_type;
  bool writes_floats;                   // the output is floats all the same
  const std::int32_t* query_positions;  // [n_sequences]: of the first query
  std::int32_t n_sequences;
  std::int32_t group;                   // query heads for each KV head
  std::int32_t n_new;
  std::int32_t n_threads;
  bool rounds;                          // queries, weights of rows and rows to bf16, where that is what the processor multiplies
  bool rounds_to_digit;                 // queries, and weights of rows, to one digit where rows have 4 or 2 bits and heads at most 128 channels; in calls with queries in 16 bits they are so anyway
  std::int64_t prompt_queries;          // from so many for each KV head on the kernel for prompts is taken
  float* scratch;                       // as many floats as the kernel asks for
  const AttentionArguments* before;     // the same call over other rows, which are attended to as well; or null
};

// New rows for the pages.
struct AppendArguments {
  Pages pages;
  HeadTensor<const void*> keys, values;  // [n_sequences, n KV heads, n_tokens, k_dim or v_dim]
  NumberType type;                       // of the new rows
  std::int32_t row;                      // in the table, of the first one
  std::int32_t n_sequences, n_tokens;
  // Those keys alone whose rows are coded together, from the first row of a group on to the last one of a group or of the
  // sequence; or all others.
  bool in_groups;
  std::int32_t n_threads;
};

}  // namespace stratakv
