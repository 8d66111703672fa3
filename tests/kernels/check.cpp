// The kernels without Python: attention of every instruction set that this processor has against plain loops in double
// precision, and forwards and new rows against the instruction set that runs everywhere. For machines whose kernels are compiled on
// another one.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

using namespace stratakv;

namespace {

std::mt19937 engine{20261126};

int any(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine); }
template <typename T>
T one_of(std::initializer_list<T> of) {
  return of.begin()[any(0, static_cast<int>(of.size()) - 1)];
}
float some() { return std::normal_distribution<float>()(engine); }

constexpr NumberType kTypes[] = {NumberType::kFloat, NumberType::kBFloat, NumberType::kHalf};
NumberType any_type() { return kTypes[any(0, 2)]; }
NumberType any_page_type() { return any(0, 1) ? any_type() : static_cast<NumberType>(any(3, 6)); }

// Kernels have ways of their own for some.
int any_dim() { return one_of({any(1, 140), 32, 64, 80, 96, 128, 192, 256}); }

// The number of a format that is nearest to x, of two the even one; or infinity.
float held(float x, NumberType type) {
  if (type == NumberType::kFloat || x == 0 || !std::isfinite(x)) return x;
  int exponent;
  std::frexp(x, &exponent);
  const bool is_half = type == NumberType::kHalf;
  const int unit = is_half ? std::max(exponent - 11, -24) : std::max(exponent - 8, -133);  // of the last place
  const double nearest = std::ldexp(std::nearbyint(std::ldexp(double{x}, -unit)), unit);
  if (std::fabs(nearest) > (is_half ? 65504.0 : 3.3895313892515355e38)) return std::copysign(INFINITY, x);
  return std::copysign(static_cast<float>(nearest), x);
}

// A number that the format holds.
void put(float x, NumberType type, char* to) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (type == NumberType::kFloat) {
    std::memcpy(to, &bits, 4);
    return;
  }
  std::uint32_t half = bits >> 16;
  if (type == NumberType::kHalf) {
    const float size = std::fabs(x);
    const std::uint32_t rest = size < 6.103515625e-5f ? std::uint32_t(std::ldexp(size, 24)) : ((bits & 0x7FFFFFFF) - (112u << 23)) >> 13;
    half = (bits >> 16 & 0x8000) | (x != x ? 0x7E00 : std::isinf(x) ? 0x7C00 : rest);
  }
  const std::uint16_t stored = static_cast<std::uint16_t>(half);
  std::memcpy(to, &stored, 2);
}

float taken(const char* from, NumberType type) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, from, type == NumberType::kFloat ? 4 : 2);
  if (type == NumberType::kHalf) {
    const int exponent = bits >> 10 & 31, rest = bits & 1023;
    const double size = exponent == 31 ? (rest ? NAN : INFINITY) : exponent ? std::ldexp(1024 + rest, exponent - 25) : std::ldexp(rest, -24);
    return static_cast<float>(bits & 0x8000 ? -size : size);
  }
  bits <<= type == NumberType::kBFloat ? 16 : 0;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

int bytes_of(NumberType type) { return type == NumberType::kFloat ? 4 : 2; }
const char* name_of(NumberType type) { return type == NumberType::kFloat ? "fp32" : type == NumberType::kBFloat ? "bf16" : type == NumberType::kHalf ? "fp16" : type == NumberType::kFloat8 ? "fp8" : type == NumberType::kInt8 ? "int8" : type == NumberType::kInt4 ? "int4" : "int2"; }

std::int64_t page_bytes(std::int64_t n, NumberType type) { return (n * bytes_of(type) + 63) / 64 * 64; }

// A page of few bits: tiles of 16 rows, then parameters in bf16 (see docs/formats.md).
struct Packed {
  NumberType type;
  bool is_key;
  int span, dim;
  bool is_even = false;  // parameters are the same everywhere
  int bits = type == NumberType::kInt4 ? 4 : type == NumberType::kInt2 ? 2 : 8, fields = 8 / bits, quads = (dim + 4 * fields - 1) / (4 * fields);
  bool of_channels = is_key && bits < 8, is_affine = !is_key && bits < 8, rotates = type == NumberType::kInt8 || is_affine;
  int words = is_key ? 0 : dim / 128 * (128 / fields) + (dim % 128 + fields - 1) / fields;  // of values, a byte for each of four rows
  int row_bytes = is_key ? quads * 4 : words;
  int tiles = (span + 15) / 16, groups = is_affine ? (dim + 127) / 128 : 1, n_parameters = is_affine ? 2 * groups : 1;

  std::int64_t bytes() const {
    const std::int64_t parameters = of_channels ? (span + 63) / 64 * 2 * dim : tiles * n_parameters * 16;
    return (std::int64_t{tiles} * row_bytes * 16 + 2 * parameters + 63) / 64 * 64;
  }

  // A parameter that was not chosen yet is no number.
  float parameter(char* page, int at, bool is_step) const {
    char* const place = page + std::int64_t{tiles} * row_bytes * 16 + 2 * at;
    const float chosen = is_even ? (is_step ? 1.0f : -0.5f) / (1 << bits) : is_step ? (0.5f + std::fabs(some())) / (1 << bits) : some();
    if (std::isnan(taken(place, NumberType::kBFloat))) put(held(chosen, NumberType::kBFloat), NumberType::kBFloat, place);
    return taken(place, NumberType::kBFloat);
  }

  void write(char* page, int row, float* values) const {
    std::vector<double> x(dim);
    for (int d = 0; d < dim; ++d) {
      const int code = type == NumberType::kFloat8 ? any(0, 126) + 128 * any(0, 1) : any(0, (1 << bits) - 1), four = d / 4;
      const int stretch = (std::min(128, dim - d / 128 * 128) + fields - 1) / fields;  // of values' channels
      const int field = is_key ? four % fields : d % 128 / stretch, shift = field * bits;
      const int word = d / 128 * (128 / fields) + d % 128 % stretch;
      char& byte = is_key ? page[((std::int64_t{row / 16} * quads + four / fields) * 16 + row % 16) * 4 + d % 4]
                          : page[(std::int64_t{row / 4} * words + word) * 4 + row % 4];
      byte = static_cast<char>((byte & ~(((1 << bits) - 1) << shift)) | code << shift);
      const int first = row / 16 * n_parameters * 16 + row % 16;
      if (of_channels) {
        const int at = row / 64 * 2 * dim + d;
        x[d] = double{parameter(page, at, true)} * code + parameter(page, at + dim, false);
      } else if (is_affine) {
        x[d] = double{parameter(page, first + d / 128 * 16, true)} * code + parameter(page, first + (groups + d / 128) * 16, false);
      } else if (type == NumberType::kInt8) {
        x[d] = double{parameter(page, first, true)} * (code - 128);
      } else {
        const int exponent = code >> 3 & 15, rest = code & 7;
        const double size = exponent ? std::ldexp(8 + rest, exponent - 10) : std::ldexp(rest, -9);
        x[d] = parameter(page, first, true) * (code & 128 ? -size : size);
      }
    }
    const int size = rotates ? dim & -dim : 1;
    for (int d = 0; d < dim; ++d) {
      double sum = 0;
      for (int i = 0; i < size; ++i) sum += (__builtin_popcount(d % size & i) % 2 ? -1 : 1) * x[d / size * size + i];
      values[d] = static_cast<float>(sum / std::sqrt(size));
    }
  }
};

// Numbers of a format, behind which lie some that are none.
struct Numbers {
  std::vector<char> bytes;
  std::vector<float> values;

  Numbers(std::size_t n, NumberType type, float size) : bytes((n + 64) * bytes_of(type)), values(n) {
    for (std::size_t i = 0; i < n + 64; ++i) {
      const float x = i < n ? held(size * some(), type) : std::numeric_limits<float>::quiet_NaN();
      if (i < n) values[i] = x;
      put(x, type, bytes.data() + i * bytes_of(type));
    }
  }
};

// What a kernel may write over; nothing that was there before is a number.
struct Room {
  std::vector<float> floats;
  explicit Room(std::size_t n) : floats(n + 16, NAN) {}
  float* at() { return reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(floats.data()) + 63) / 64 * 64); }
};

// Within `tolerance` of what was expected, or of what was added up to it.
bool is_near(const std::string& what, const std::vector<float>& found, const std::vector<double>& expected, double tolerance,
             const std::vector<double>& sizes = {}) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double size = 1 + (sizes.empty() ? std::fabs(expected[i]) : sizes[i]);
    if (found[i] == expected[i] || (std::isfinite(expected[i]) && std::fabs(found[i] - expected[i]) <= tolerance * size)) continue;
    std::printf("%s: number %zu is %g, expected %g\n", what.c_str(), i, found[i], expected[i]);
    return false;
  }
  return true;
}

// A call over random pages, of which rows that were not written are no numbers.
struct Call {
  int n_sequences = any(1, 3), heads = any(1, 3), group = one_of({1, 2, 3, 4, 5, 16}), n_new = one_of({1, 1, 2, 9, 40}), span = one_of({1, 7, 16, 64});
  int k_dim = any_dim(), v_dim = any(0, 1) ? k_dim : any_dim(), n_queries = heads * group, most = 0, n_blocks = 1;
  NumberType k_type = any_page_type(), v_type = any_page_type(), type = any_type();
  bool is_even = any(0, 2) == 0;  // queries are whole numbers, and parameters of packed rows the same everywhere
  std::vector<std::int32_t> counts, skips, firsts, query_positions, table;
  std::vector<float> keys, values;
  std::vector<char> slab;
  std::int64_t slabs[1];
  AttentionArguments a{};  // before what is made together with it
  Numbers query;
  std::vector<char> out;
  std::vector<float> lse;

  Call(const std::vector<std::int32_t>& olds, float size, float mean = 0) : n_sequences(static_cast<int>(olds.size())), query(make_rows(olds, size, mean)) {
    const std::int64_t all = std::int64_t{n_queries} * n_new;
    out.assign(n_sequences * all * v_dim * bytes_of(type), '\xFF');
    lse.assign(n_sequences * all, NAN);
    a.rows = {counts.data(), skips.data(), firsts.data(), nullptr};
    a.query = {query.bytes.data(), all * k_dim, std::int64_t{n_new} * k_dim, k_dim};
    a.out = {out.data(), all * v_dim, std::int64_t{n_new} * v_dim, v_dim};
    a.lse = {lse.data(), all, n_new, 1};
    a.query_type = type;
    a.query_positions = query_positions.data();
    a.n_sequences = n_sequences;
    a.group = group;
    a.n_new = n_new;
    a.n_threads = any(1, 3);
    a.prompt_queries = one_of({1, 24, 100000});
  }
  Call(const Call&) = delete;

  void run(const Kernels& kernels) {
    Room scratch(kernels.attend_floats(a));
    a.scratch = scratch.at();
    kernels.attend(a);
  }

  // Of rows of few bits queries and weights that may be rounded have 8 bits, which even queries fit into, and even weights.
  bool is_coarse(NumberType of_rows) const { return (of_rows == NumberType::kInt4 || of_rows == NumberType::kInt2) && (a.rounds_to_digit || type != NumberType::kFloat) && k_dim <= 128; }

  // Tiles take 16 of the 24 bits of queries and weights.
  bool is_packed() const { return !is_plain(k_type) || !is_plain(v_type); }
  bool is_tiled(const Kernels& kernels) const {
    return std::string(kernels.isa) == "amx" && k_type != NumberType::kFloat && v_type != NumberType::kFloat;
  }

  // bf16 rows meet queries and weights that are rounded to it.
  bool takes_pairs(const Kernels& kernels) const {
    return std::string(kernels.isa) == "avx512_bf16" && !kernels.is_prompt(a) && (a.rounds || type == NumberType::kBFloat);
  }

  // Of one row of the slab: row r of a sequence's keys (or values) for one head.
  std::size_t at(int sequence, int head, int row) const { return (std::size_t(sequence) * heads + head) * most + row; }

 private:
  // olds[s]: rows before the new ones; below 0: the sequence has no rows at all.
  Numbers make_rows(const std::vector<std::int32_t>& olds, float size, float mean) {
    for (std::int32_t old : olds) {
      counts.push_back(old < 0 ? 0 : old + n_new);
      skips.push_back(any(0, 3) == 0 ? any(0, counts.back()) : 0);
      firsts.push_back(any(0, 1) * any(0, 100));
      query_positions.push_back(firsts.back() + std::max(old, 0));
      most = std::max(most, counts.back());
    }
    n_blocks = std::max(1, (most + span - 1) / span);
    const std::int64_t k_page = is_plain(k_type) ? page_bytes(std::int64_t{span} * k_dim, k_type) : Packed{k_type, true, span, k_dim}.bytes();
    const std::int64_t v_page = is_plain(v_type) ? page_bytes(std::int64_t{span} * v_dim, v_type) : Packed{v_type, false, span, v_dim}.bytes();
    for (int i = 0; i < n_blocks * n_sequences; ++i) table.insert(table.end(), {0, n_blocks * n_sequences - 1 - i});
    a.pages = {slabs, table.data(), 2 * n_blocks, heads * (k_page + v_page), k_page, v_page, heads, span, k_dim, v_dim, k_type, v_type};
    slab.assign(a.pages.block_bytes * n_blocks * n_sequences + 64, '\xFF');
    char* const first = slab.data() + (64 - reinterpret_cast<std::uintptr_t>(slab.data()) % 64) % 64;
    slabs[0] = reinterpret_cast<std::int64_t>(first);
    keys.resize(at(n_sequences, 0, 0) * k_dim);
    values.resize(at(n_sequences, 0, 0) * v_dim);
    for (int s = 0; s < n_sequences; ++s) {
      for (int h = 0; h < heads; ++h) {
        for (int r = skips[s]; r < counts[s]; ++r) {
          char* const block = first + table[2 * (s * n_blocks + r / span) + 1] * a.pages.block_bytes;
          float *const key = keys.data() + at(s, h, r) * k_dim, *const value = values.data() + at(s, h, r) * v_dim;
          char *const k_place = block + h * k_page, *const v_place = block + heads * k_page + h * v_page;
          if (is_plain(k_type)) write(k_place, r % span, k_dim, k_type, key, 1, 0);
          else Packed{k_type, true, span, k_dim, is_even}.write(k_place, r % span, key);
          if (is_plain(v_type)) write(v_place, r % span, v_dim, v_type, value, size, mean);
          else Packed{v_type, false, span, v_dim, is_even}.write(v_place, r % span, value);
        }
      }
    }
    Numbers numbers(std::size_t(n_sequences) * n_queries * n_new * k_dim, type, 1);
    for (std::size_t i = 0; is_even && i < numbers.values.size(); ++i) {
      numbers.values[i] = i % k_dim == 0 ? 127.0f : any(-127, 127);
      put(numbers.values[i], type, numbers.bytes.data() + i * bytes_of(type));
    }
    return numbers;
  }

  static void write(char* page, int row, int dim, NumberType type, float* values, float size, float mean) {
    for (int d = 0; d < dim; ++d) {
      values[d] = held(mean + size * some(), type);
      if (std::isinf(values[d])) values[d] = 0;
      put(values[d], type, page + (std::int64_t{row} * dim + d) * bytes_of(type));
    }
  }
};

bool check_attention(const Kernels& kernels) {
  std::vector<std::int32_t> olds(any(1, 3));
  for (std::int32_t& old : olds) old = one_of({-1, 0, 3, 62, 129, 400});
  Call call(olds, 1);
  AttentionArguments& a = call.a;
  // Even queries are a hundred times as large; with a scale of 0 all weights are even, too.
  a.rules = {call.is_even ? one_of({0.0f, 0.003f}) : 0.3f, one_of({0.0f, 4.0f}), any(0, 1), one_of({0, 0, 9}), one_of({0, 3}), nullptr, nullptr};
  a.rounds = any(0, 3) == 0;
  a.rounds_to_digit = any(0, 3) == 0;
  call.run(kernels);
  const bool rounds_queries = call.takes_pairs(kernels) && call.k_type == NumberType::kBFloat;
  const bool rounds_weights = call.takes_pairs(kernels) && call.v_type == NumberType::kBFloat;
  std::vector<double> expected, expected_lse, sizes;
  for (std::size_t i = 0; i < call.lse.size(); ++i) {
    const int token = i % call.n_new, head = i / call.n_new % call.n_queries / call.group, s = i / call.n_new / call.n_queries;
    const int mine = call.query_positions[s] + token;
    const float* const query = call.query.values.data() + i * call.k_dim;
    double sum = 0;
    std::vector<double> gathered(call.v_dim), size(call.v_dim);
    for (int r = call.skips[s]; r < call.counts[s]; ++r) {
      const int position = call.firsts[s] + r;
      if (a.rules.is_causal && position > mine) continue;
      if (a.rules.window && position <= mine - a.rules.window && position >= a.rules.sinks) continue;
      const float* const key = call.keys.data() + call.at(s, head, r) * call.k_dim;
      const float* const value = call.values.data() + call.at(s, head, r) * call.v_dim;
      double score = 0;
      for (int d = 0; d < call.k_dim; ++d) score += double{rounds_queries ? held(query[d], NumberType::kBFloat) : query[d]} * key[d];
      score *= a.rules.scale;
      if (a.rules.softcap > 0) score = a.rules.softcap * std::tanh(score / a.rules.softcap);
      const double weight = std::exp(score);
      sum += weight;
      for (int d = 0; d < call.v_dim; ++d) {
        gathered[d] += weight * value[d];
        size[d] += weight * std::fabs(value[d]);
      }
    }
    expected_lse.push_back(std::log(sum));
    for (double x : gathered) expected.push_back(sum == 0 ? 0 : x / sum);
    for (double x : size) sizes.push_back(sum == 0 ? 0 : x / sum);
  }
  std::vector<float> found;
  for (std::size_t i = 0; i < expected.size(); ++i) found.push_back(taken(call.out.data() + i * bytes_of(call.type), call.type));
  const bool rounds_all = a.rounds && kernels.tiles_bf16 && kernels.is_prompt(a);
  const double tolerance = rounds_all ? 5e-2 : call.is_packed() ? 2e-3 : call.is_tiled(kernels) ? 2e-4 : 2e-5;
  const double rounding = (rounds_weights ? 4e-3 : 0) + (call.type == NumberType::kFloat ? 0 : call.type == NumberType::kBFloat ? 4e-3 : 5e-4);
  const double of_keys = call.is_coarse(call.k_type) && !call.is_even ? 3e-2 : 0;
  const double of_values = call.is_coarse(call.v_type) && a.rules.scale != 0 ? 3e-2 : 0;
  const std::string what = std::string(kernels.isa) + " attention, " + (call.is_even ? "even, " : "") + name_of(call.k_type) + " " + std::to_string(call.k_dim) + ", " +
                           name_of(call.v_type) + " " + std::to_string(call.v_dim) + ", queries in " + name_of(call.type) + ", first rows " +
                           std::to_string(call.counts[0]) + ", new " + std::to_string(call.n_new) + ", group " + std::to_string(call.group);
  return is_near(what, found, expected, tolerance + rounding + of_keys + of_values, sizes) &&
         is_near(what + ", log-sum-exp", call.lse, expected_lse, tolerance + of_keys);
}

// Who sees one row only gets its values, rounded to nearest.
bool check_rounding(const Kernels& kernels) {
  const float sizes[] = {1e-39f, 1e-7f, 3e-5f, 1, 300, 3e4f, 1e38f};  // of values
  const float size = sizes[any(0, 6)];
  Call call({0}, size);
  if (call.n_new > 1 || call.skips[0] > 0 || call.is_packed() || call.is_tiled(kernels)) return true;
  if (call.v_type == NumberType::kBFloat && call.takes_pairs(kernels) && size == sizes[0]) return true;
  call.a.rules = {0.0f, 0, 1, 0, 0, nullptr, nullptr};
  call.run(kernels);
  for (int q = 0; q < call.n_queries; ++q) {
    for (int d = 0; d < call.v_dim; ++d) {
      const float value = call.values[call.at(0, q / call.group, 0) * call.v_dim + d], expected = held(value, call.type);
      const float found = taken(call.out.data() + (std::int64_t{q} * call.v_dim + d) * bytes_of(call.type), call.type);
      if (found == expected) continue;
      std::printf("%s: %.9g as %s is %.9g, expected %.9g\n", kernels.isa, value, name_of(call.type), found, expected);
      return false;
    }
  }
  return true;
}

// Values that are all 1 stay 1, however weights are rounded: not all to one side. Where a few rows have all weight, as
// beside even queries, which are large, roundings do not even out.
bool check_weights(const Kernels& kernels) {
  Call call({400}, 0, 1);
  if (!is_plain(call.v_type) || call.skips[0] > 0 || call.is_even) return true;
  call.a.rules = {0.6f / std::sqrt(static_cast<float>(call.k_dim)), 0, 0, 0, 0, nullptr, nullptr};
  call.a.rounds = any(0, 1);
  call.run(kernels);
  for (std::size_t i = 0; i < call.out.size() / bytes_of(call.type); ++i) {
    const float found = taken(call.out.data() + i * bytes_of(call.type), call.type);
    if (std::fabs(found - 1) <= 1e-3) continue;
    std::printf("%s: weights of rows in %s add up to %.9g, new %d\n", kernels.isa, name_of(call.v_type), found, call.n_new);
    return false;
  }
  return true;
}

// One layer of random sizes, over an empty cache. Every kernel gets the same numbers.
struct Decoder {
  NumberType type = any_type(), k_type = any_type(), v_type = any_type();
  Activation activation = one_of({Activation::kSilu, Activation::kGeluTanh});
  int pairs = any(1, 20), head_dim = 2 * pairs, kv_heads = any(1, 2), heads = kv_heads * any(1, 3), hidden = any(1, 70), intermediate = any(1, 90);
  int n_new = one_of({1, 5, 13, 30}), n_sequences = any(1, 3), vocabulary = 50, qkv = (heads + 2 * kv_heads) * head_dim;
  Numbers embedding = weights(vocabulary * hidden), qkv_weight = weights(qkv * hidden), output = weights(hidden * heads * head_dim);
  Numbers gate_up = weights(2 * intermediate * hidden), down = weights(hidden * intermediate);
  Numbers norm{std::size_t(hidden), NumberType::kFloat, 1}, bias{std::size_t(qkv), NumberType::kFloat, 1};
  std::vector<float> cosines, sines;
  std::vector<std::int32_t> tokens;

  Numbers weights(int n) const { return {std::size_t(n), type, 0.2f}; }

  Decoder() {
    for (int i = 0; i < n_new * pairs; ++i) {
      cosines.push_back(std::cos(0.1f * i));
      sines.push_back(std::sin(0.1f * i));
    }
    for (int i = 0; i < n_sequences * n_new; ++i) tokens.push_back(any(0, vocabulary - 1));
  }

  std::vector<float> logits(const Kernels& kernels) const {
    const auto matrix = [&](const Numbers& of, int rows, int columns, const float* bias_of = nullptr) {
      return Matrix{of.bytes.data(), bias_of, rows, columns, type, false};
    };
    const float* const scale = reinterpret_cast<const float*>(norm.bytes.data());
    const std::int64_t k_page = page_bytes(std::int64_t{n_new} * head_dim, k_type), v_page = page_bytes(std::int64_t{n_new} * head_dim, v_type);
    Layer layer{scale, nullptr, nullptr, nullptr, scale, nullptr, matrix(qkv_weight, qkv, hidden, reinterpret_cast<const float*>(bias.bytes.data())),
                matrix(output, hidden, heads * head_dim), matrix(gate_up, 2 * intermediate, hidden), matrix(down, hidden, intermediate), 0, {}};
    Model model{hidden, intermediate, head_dim, heads, kv_heads, 1e-5f, 1.5f, 0.2f, 0, 6.0f, activation, false,
                matrix(embedding, vocabulary, hidden), matrix(embedding, vocabulary, hidden), scale, &layer, 1};
    const std::int64_t block_bytes = kv_heads * (k_page + v_page);
    Room slab((block_bytes * n_sequences + 3) / 4);
    std::vector<std::int32_t> table, zeros(n_sequences), counts(n_sequences, n_new);
    for (int s = 0; s < n_sequences; ++s) table.insert(table.end(), {0, s});
    const std::int64_t slabs[] = {reinterpret_cast<std::int64_t>(slab.at())};
    layer.strands[0] = {0, slabs, block_bytes, k_page, v_page, k_type, v_type};
    layer.strands[1].group = -1;
    const GroupRows group{table.data(), 2, counts.data(), zeros.data(), zeros.data(), nullptr, n_new, 0, 0, table.data(), 2, 0};
    const Rotation rotation{cosines.data(), sines.data(), pairs};
    const std::size_t rows = std::size_t(n_sequences) * n_new;
    std::vector<float> stream(rows * hidden), normed(rows * std::max({hidden, heads * head_dim, intermediate}));
    std::vector<float> produced(rows * std::max({qkv, 2 * intermediate, hidden})), lse(rows * heads), found(rows * vocabulary);
    Forward step{tokens.data(), zeros.data(), n_sequences, n_new, 2, 24, &group, &rotation, stream.data(), normed.data(), produced.data(),
                 lse.data(), nullptr, n_new, zeros.data(), found.data()};
    Room scratch(kernels.forward_floats(model, step));
    step.scratch = scratch.at();
    kernels.forward(model, step);
    return found;
  }
};

bool check_forward(const Kernels& kernels, const Kernels& everywhere) {
  const Decoder decoder;
  const std::vector<float> expected = decoder.logits(everywhere);
  // Sums in another order are sometimes rounded to the other side when they are stored.
  const bool is_exact = decoder.k_type == NumberType::kFloat && decoder.v_type == NumberType::kFloat;
  const std::string what = std::string(kernels.isa) + " forward in " + name_of(decoder.type) + ", pages " + name_of(decoder.k_type) + " and " +
                           name_of(decoder.v_type) + ", hidden " + std::to_string(decoder.hidden);
  return is_near(what, decoder.logits(kernels), {expected.begin(), expected.end()}, is_exact ? 2e-4 : 2e-2);
}

// New rows become the same bytes as by the instruction set that runs everywhere.
bool check_append(const Kernels& kernels, const Kernels& everywhere) {
  const NumberType type = any_type(), k_type = any_page_type(), v_type = any_page_type();
  const int n_sequences = any(1, 2), heads = any(1, 3), span = one_of({1, 7, 16, 48, 64, 150}), k_dim = any(1, 300), v_dim = any(1, 300);
  const int row = any(0, span - 1), n_tokens = any(1, 150), n_blocks = (row + n_tokens + span - 1) / span;
  const std::int64_t k_page = is_plain(k_type) ? page_bytes(std::int64_t{span} * k_dim, k_type) : Packed{k_type, true, span, k_dim}.bytes();
  const std::int64_t v_page = is_plain(v_type) ? page_bytes(std::int64_t{span} * v_dim, v_type) : Packed{v_type, false, span, v_dim}.bytes();
  const auto rows = [&](int dim) {
    Numbers numbers(std::size_t(n_sequences) * heads * n_tokens * dim, type, one_of({1e-40f, 1e-20f, 1.0f, 1e4f, 1e30f}));
    for (int i = any(0, 1) * 20; i > 0; --i) {
      const std::size_t first = any(0, n_sequences * heads * n_tokens * dim - dim);
      const float x = one_of({0.0f, -0.0f, 60000.0f, -1e-4f});
      for (int d = 0; d < one_of({1, dim}); ++d) put(held(x, type), type, numbers.bytes.data() + (first + d) * bytes_of(type));
    }
    return numbers;
  };
  const Numbers keys = rows(k_dim), values = rows(v_dim);
  std::vector<std::int32_t> table;
  for (int i = 0; i < n_blocks * n_sequences; ++i) table.insert(table.end(), {0, n_blocks * n_sequences - 1 - i});
  const auto written = [&](const Kernels& by, int n_threads) {
    AppendArguments a{};
    a.pages = {nullptr, table.data(), 2 * n_blocks, heads * (k_page + v_page), k_page, v_page, heads, span, k_dim, v_dim, k_type, v_type};
    std::vector<char> slab(a.pages.block_bytes * n_blocks * n_sequences, '\x33');
    const std::int64_t slabs[] = {reinterpret_cast<std::int64_t>(slab.data())};
    a.pages.slabs = slabs;
    a.keys = {keys.bytes.data(), std::int64_t{heads} * n_tokens * k_dim, k_dim, std::int64_t{heads} * k_dim};
    a.values = {values.bytes.data(), std::int64_t{heads} * n_tokens * v_dim, v_dim, std::int64_t{heads} * v_dim};
    a.type = type;
    a.n_sequences = n_sequences;
    a.n_threads = n_threads;
    a.n_tokens = n_tokens;
    a.row = row;
    by.append(a);
    a.in_groups = true;
    a.row = 0;
    by.append(a);
    return slab;
  };
  if (written(kernels, any(1, 3)) == written(everywhere, 1)) return true;
  std::printf("%s: rows of %d and %d in %s become other bytes, pages %s and %s of %d rows, %d from row %d on\n", kernels.isa, k_dim, v_dim,
              name_of(type), name_of(k_type), name_of(v_type), span, n_tokens, row);
  return false;
}

}  // namespace

int main() {
  std::size_t count = 0;
  const Kernels* const* const all = compiled_kernels(count);
  bool are_right = true;
  for (std::size_t i = 0; i < count; ++i) {
    if (!all[i]->is_supported()) continue;
    bool is_right = true;
    int n = 0;
    for (; is_right && n < 400; ++n) {
      is_right = check_attention(*all[i]) && check_rounding(*all[i]) && check_weights(*all[i]);
      if (i < count - 1) is_right = is_right && check_forward(*all[i], *all[count - 1]) && check_append(*all[i], *all[count - 1]);
    }
    std::printf("%s: %d rounds, %s\n", all[i]->isa, n, is_right ? "right" : "WRONG");
    are_right = are_right && is_right;
  }
  return are_right ? 0 : 1;
}
