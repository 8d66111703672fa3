// The kernels without Python: every instruction set that this processor has against plain loops in double precision
// (attention) and against the one that runs everywhere (a forward). For machines whose kernels are compiled on another one.
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

// A number that the format holds exactly, so that nothing is rounded on the way.
float held(float x, NumberType type) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (type == NumberType::kBFloat) bits &= 0xFFFF0000u;
  if (type == NumberType::kHalf) bits = std::fabs(x) < 6.2e-5f ? 0 : bits & 0xFFFFE000u;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

void put(float x, NumberType type, char* to) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (type == NumberType::kFloat) std::memcpy(to, &bits, 4);
  std::uint16_t half = static_cast<std::uint16_t>(bits >> 16);
  if (type == NumberType::kHalf) half = static_cast<std::uint16_t>((bits >> 16 & 0x8000) | (bits << 1 == 0 ? 0 : ((bits & 0x7FFFFFFF) - (112u << 23)) >> 13));
  if (type != NumberType::kFloat) std::memcpy(to, &half, 2);
}

int bytes_of(NumberType type) { return type == NumberType::kFloat ? 4 : 2; }
const char* name_of(NumberType type) { return type == NumberType::kFloat ? "fp32" : type == NumberType::kBFloat ? "bf16" : "fp16"; }

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

bool is_near(const std::string& what, const std::vector<float>& found, const std::vector<double>& expected, double tolerance) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (found[i] == expected[i] || std::fabs(found[i] - expected[i]) <= tolerance * (1 + std::fabs(expected[i]))) continue;
    std::printf("%s: number %zu is %g, expected %g\n", what.c_str(), i, found[i], expected[i]);
    return false;
  }
  return true;
}

bool check_attention(const Kernels& kernels) {
  const NumberType types[] = {NumberType::kFloat, NumberType::kBFloat, NumberType::kHalf};
  const int heads = any(1, 3), group = any(1, 5), n_new = one_of({1, 1, 2, 40}), n_old = one_of({0, 3, 62, 129, 400}), span = one_of({1, 7, 16, 64});
  const int k_dim = one_of({1, 6, 20, 32, 64, 80, 128}), v_dim = one_of({1, 6, 20, 32, 64, 80, 128}), n_rows = n_old + n_new;
  const NumberType k_type = types[any(0, 2)], v_type = types[any(0, 2)];
  const int n_blocks = (n_rows + span - 1) / span, n_queries = heads * group;
  AttentionArguments a{};
  a.rules = {0.3f, one_of({0.0f, 4.0f}), 1, one_of({0, 0, 9}), 0, nullptr, nullptr};
  const std::int64_t k_page = std::int64_t{span} * k_dim * bytes_of(k_type), v_page = std::int64_t{span} * v_dim * bytes_of(v_type);
  a.pages = {nullptr, nullptr, 2 * n_blocks, heads * (k_page + v_page), k_page, v_page, heads, span, k_dim, v_dim, k_type, v_type};
  std::vector<char> slab(a.pages.block_bytes * n_blocks, '\xFF');  // rows that were not written are no numbers
  std::vector<std::int32_t> table(2 * n_blocks);
  for (int i = 0; i < n_blocks; ++i) table[2 * i + 1] = n_blocks - 1 - i;
  std::vector<float> keys(std::size_t(heads) * n_rows * k_dim), values(std::size_t(heads) * n_rows * v_dim);
  for (int h = 0; h < heads; ++h) {
    for (int r = 0; r < n_rows; ++r) {
      char* const block = slab.data() + table[2 * (r / span) + 1] * a.pages.block_bytes;
      for (int d = 0; d < k_dim; ++d) {
        const float x = keys[(std::size_t(h) * n_rows + r) * k_dim + d] = held(some(), k_type);
        put(x, k_type, block + h * k_page + (std::int64_t{r % span} * k_dim + d) * bytes_of(k_type));
      }
      for (int d = 0; d < v_dim; ++d) {
        const float x = values[(std::size_t(h) * n_rows + r) * v_dim + d] = held(some(), v_type);
        put(x, v_type, block + heads * k_page + h * v_page + (std::int64_t{r % span} * v_dim + d) * bytes_of(v_type));
      }
    }
  }
  const std::int64_t slabs[] = {reinterpret_cast<std::int64_t>(slab.data())};
  a.pages.slabs = slabs;
  a.pages.table = table.data();
  const std::int32_t counts[] = {n_rows}, none[] = {0}, first_query[] = {n_old};
  a.rows = {counts, none, none, nullptr};
  std::vector<float> query(std::size_t(n_queries) * n_new * k_dim), out(std::size_t(n_queries) * n_new * v_dim), lse(std::size_t(n_queries) * n_new);
  for (float& x : query) x = some();
  a.query = {query.data(), 0, std::int64_t{n_new} * k_dim, k_dim};
  a.out = {out.data(), 0, std::int64_t{n_new} * v_dim, v_dim};
  a.lse = {lse.data(), 0, n_new, 1};
  a.query_type = NumberType::kFloat;
  a.query_positions = first_query;
  a.n_sequences = 1;
  a.group = group;
  a.n_new = n_new;
  a.n_threads = any(1, 3);
  a.prompt_queries = one_of({1, 24, 100000});
  std::vector<float> scratch(kernels.attend_floats(a) + 16, std::numeric_limits<float>::quiet_NaN());
  a.scratch = reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(scratch.data()) + 63) / 64 * 64);
  kernels.attend(a);
  std::vector<double> expected(out.size()), expected_lse(lse.size());
  for (int q = 0; q < n_queries; ++q) {
    for (int t = 0; t < n_new; ++t) {
      const int end = n_old + t + 1, begin = a.rules.window == 0 ? 0 : std::max(0, end - a.rules.window);
      double sum = 0;
      std::vector<double> gathered(v_dim);
      for (int r = begin; r < end; ++r) {
        double score = 0;
        for (int d = 0; d < k_dim; ++d) score += double(query[(std::size_t(q) * n_new + t) * k_dim + d]) * keys[(std::size_t(q / group) * n_rows + r) * k_dim + d];
        score *= a.rules.scale;
        if (a.rules.softcap > 0) score = a.rules.softcap * std::tanh(score / a.rules.softcap);
        const double weight = std::exp(score);
        sum += weight;
        for (int d = 0; d < v_dim; ++d) gathered[d] += weight * values[(std::size_t(q / group) * n_rows + r) * v_dim + d];
      }
      expected_lse[std::size_t(q) * n_new + t] = std::log(sum);
      for (int d = 0; d < v_dim; ++d) expected[(std::size_t(q) * n_new + t) * v_dim + d] = gathered[d] / sum;
    }
  }
  const std::string what = std::string(kernels.isa) + " attention, " + name_of(k_type) + " " + std::to_string(k_dim) + ", " + name_of(v_type) + " " +
                           std::to_string(v_dim) + ", rows " + std::to_string(n_rows) + ", new " + std::to_string(n_new) + ", group " + std::to_string(group);
  return is_near(what, out, expected, 2e-4) && is_near(what + ", log-sum-exp", lse, expected_lse, 2e-4);
}

// One layer of random sizes, over an empty cache. Every kernel gets the same numbers.
struct Decoder {
  NumberType type = one_of({NumberType::kFloat, NumberType::kBFloat, NumberType::kHalf});
  int pairs = any(1, 20), head_dim = 2 * pairs, kv_heads = any(1, 2), heads = kv_heads * any(1, 3), hidden = any(1, 70), intermediate = any(1, 90);
  int n_new = one_of({1, 5, 30}), n_sequences = any(1, 3), vocabulary = 50, qkv = (heads + 2 * kv_heads) * head_dim;
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
    const std::int64_t page = std::int64_t{n_new} * head_dim * 4;
    Layer layer{scale, nullptr, nullptr, nullptr, scale, nullptr, matrix(qkv_weight, qkv, hidden, reinterpret_cast<const float*>(bias.bytes.data())),
                matrix(output, hidden, heads * head_dim), matrix(gate_up, 2 * intermediate, hidden), matrix(down, hidden, intermediate), 0, 0,
                2 * kv_heads * page, page, page, NumberType::kFloat, NumberType::kFloat};
    Model model{hidden, intermediate, head_dim, heads, kv_heads, 1e-5f, 1.5f, 0.2f, 0, 6.0f, Activation::kSilu, false,
                matrix(embedding, vocabulary, hidden), matrix(embedding, vocabulary, hidden), scale, &layer, 1};
    std::vector<char> slab(layer.block_bytes * n_sequences);
    std::vector<std::int32_t> table, zeros(n_sequences), counts(n_sequences, n_new);
    for (int s = 0; s < n_sequences; ++s) table.insert(table.end(), {0, s});
    const std::int64_t slabs[] = {reinterpret_cast<std::int64_t>(slab.data())};
    const std::int64_t* const of_layers[] = {slabs};
    const GroupRows group{table.data(), 2, counts.data(), zeros.data(), zeros.data(), nullptr, n_new, 0, 0};
    const Rotation rotation{cosines.data(), sines.data(), pairs};
    const std::size_t rows = std::size_t(n_sequences) * n_new;
    std::vector<float> stream(rows * hidden), normed(rows * std::max({hidden, heads * head_dim, intermediate}));
    std::vector<float> produced(rows * std::max({qkv, 2 * intermediate, hidden})), lse(rows * heads), found(rows * vocabulary);
    Forward step{tokens.data(), zeros.data(), n_sequences, n_new, 2, 24, &group, of_layers, &rotation, stream.data(), normed.data(), produced.data(),
                 lse.data(), nullptr, n_new, zeros.data(), found.data()};
    std::vector<float> scratch(kernels.forward_floats(model, step) + 16);
    step.scratch = reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(scratch.data()) + 63) / 64 * 64);
    kernels.forward(model, step);
    return found;
  }
};

bool check_forward(const Kernels& kernels, const Kernels& everywhere) {
  const Decoder decoder;
  const std::vector<float> expected = decoder.logits(everywhere);
  return is_near(std::string(kernels.isa) + " forward in " + name_of(decoder.type) + ", hidden " + std::to_string(decoder.hidden), decoder.logits(kernels),
                 {expected.begin(), expected.end()}, 2e-4);
}

}  // namespace

int main() {
  std::size_t count = 0;
  const Kernels* const* const all = compiled_kernels(count);
  bool is_right = true;
  for (std::size_t i = 0; i < count; ++i) {
    if (!all[i]->is_supported()) continue;
    int n = 0;
    for (; is_right && n < 400; ++n) is_right = check_attention(*all[i]) && check_forward(*all[i], *all[count - 1]);
    std::printf("%s: %d rounds, %s\n", all[i]->isa, n, is_right ? "right" : "WRONG");
  }
  return is_right ? 0 : 1;
}
