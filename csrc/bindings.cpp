// What Python sees: addresses and sizes in, nothing out but the numbers that were written. Callers check.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "attention/arguments.h"
#include "kernels.h"
#include "reading.h"
#include "room.h"
#include "runner/bindings.h"
#include "sampling.h"

namespace nb = nanobind;
using stratakv::AppendArguments;
using stratakv::AttentionArguments;
using stratakv::Kernels;

namespace {

std::vector<std::string> supported_isas() {
  std::size_t count = 0;
  const Kernels* const* all = stratakv::compiled_kernels(count);
  std::vector<std::string> names;
  for (std::size_t i = 0; i < count; ++i) {
    if (all[i]->is_supported()) names.emplace_back(all[i]->isa);
  }
  return names;
}

bool is_supported(const std::string& isa) {
  std::size_t count = 0;
  const Kernels* const* all = stratakv::compiled_kernels(count);
  return std::any_of(all, all + count, [&](const Kernels* each) { return isa == each->isa && each->is_supported(); });
}

template <typename T>
T* at(std::intptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Numbers from one sequence, head and token to the next.
using Strides = std::tuple<std::int64_t, std::int64_t, std::int64_t>;

// A call over pages, whose arguments are set in groups. Once they are set, threads may run it side by side.
template <typename Arguments>
class Call {
 public:
  explicit Call(const std::string& isa) : kernels_(&stratakv::kernels_of(isa.c_str())) {}

  void set_pages(std::intptr_t table, std::int64_t table_stride, int n_sequences, int n_heads, int block_tokens) {
    a_.pages.table = at<const std::int32_t>(table);
    a_.pages.table_stride = table_stride;
    a_.pages.n_heads = n_heads;
    a_.pages.block_tokens = block_tokens;
    a_.n_sequences = n_sequences;
  }

  void set_member(std::int64_t block_bytes, std::int64_t k_page_bytes, std::int64_t v_page_bytes, int k_dim, int v_dim, int k_type,
                  int v_type) {
    a_.pages.block_bytes = block_bytes;
    a_.pages.k_page_bytes = k_page_bytes;
    a_.pages.v_page_bytes = v_page_bytes;
    a_.pages.k_dim = k_dim;
    a_.pages.v_dim = v_dim;
    a_.pages.k_type = static_cast<stratakv::NumberType>(k_type);
    a_.pages.v_type = static_cast<stratakv::NumberType>(v_type);
  }

 protected:
  const Kernels* kernels_;
  Arguments a_{};
};

// New rows into pages.
class Append : public Call<AppendArguments> {
 public:
  using Call::Call;

  void set_rows(int row, int n_tokens, bool in_groups, int n_threads) {
    a_.row = row;
    a_.n_tokens = n_tokens;
    a_.in_groups = in_groups;
    a_.n_threads = n_threads;
  }

  void run(std::intptr_t slabs, std::intptr_t keys, const Strides& k, std::intptr_t values, const Strides& v, int type) const {
    AppendArguments a = a_;
    a.pages.slabs = at<const std::int64_t>(slabs);
    a.keys = {at<const void>(keys), std::get<0>(k), std::get<1>(k), std::get<2>(k)};
    a.values = {at<const void>(values), std::get<0>(v), std::get<1>(v), std::get<2>(v)};
    a.type = static_cast<stratakv::NumberType>(type);
    nb::gil_scoped_release release;
    kernels_->append(a);
  }
};

// Attention of new queries.
class Step : public Call<AttentionArguments> {
 public:
  using Call::Call;

  void set_rows(std::intptr_t counts, std::intptr_t skips, std::intptr_t first_positions, std::intptr_t positions,
                std::intptr_t query_positions) {
    a_.rows = {at<const std::int32_t>(counts), at<const std::int32_t>(skips), at<const std::int32_t>(first_positions),
               at<const std::int32_t>(positions)};
    a_.query_positions = at<const std::int32_t>(query_positions);
  }

  void set_rules(float scale, float softcap, bool is_causal, int window, int sinks, std::intptr_t slopes, std::intptr_t head_sinks) {
    a_.rules = {scale, softcap, is_causal, window, sinks, at<const float>(slopes), at<const float>(head_sinks)};
  }

  void set_mask(std::intptr_t data, std::int64_t sequence, std::int64_t head, std::int64_t token, int kind, int offset) {
    a_.mask = {{at<const void>(data), sequence, head, token}, static_cast<stratakv::MaskKind>(kind), offset};
  }

  void set_queries(int group, int n_new, int type, int n_threads, std::int64_t prompt_queries) {
    a_.group = group;
    a_.n_new = n_new;
    a_.query_type = static_cast<stratakv::NumberType>(type);
    a_.n_threads = n_threads;
    a_.prompt_queries = prompt_queries;
  }

  bool is_prompt() const { return kernels_->is_prompt(a_); }

  void run(std::intptr_t slabs, std::intptr_t query, const Strides& q, std::intptr_t out, const Strides& o, std::intptr_t lse) {
    run(a_, nullptr, slabs, query, q, out, o, lse);
  }

  // Over the rows of `before`, whose call is the same, as well.
  void run_after(const Step& before, std::intptr_t before_slabs, std::intptr_t slabs, std::intptr_t query, const Strides& q, std::intptr_t out,
                 const Strides& o, std::intptr_t lse) {
    AttentionArguments first = before.a_;
    first.pages.slabs = at<const std::int64_t>(before_slabs);
    run(a_, &first, slabs, query, q, out, o, lse);
  }

 private:
  void run(AttentionArguments a, AttentionArguments* before, std::intptr_t slabs, std::intptr_t query, const Strides& q, std::intptr_t out,
           const Strides& o, std::intptr_t lse) {
    a.pages.slabs = at<const std::int64_t>(slabs);
    a.query = {at<const void>(query), std::get<0>(q), std::get<1>(q), std::get<2>(q)};
    a.out = {at<void>(out), std::get<0>(o), std::get<1>(o), std::get<2>(o)};
    const std::int64_t n_query_heads = std::int64_t{a.pages.n_heads} * a.group;
    a.lse = {at<float>(lse), n_query_heads * a.n_new, a.n_new, 1};
    if (before != nullptr) {
      before->query = a.query;
      before->out = a.out;
      before->lse = a.lse;
      a.before = before;
    }
    thread_local stratakv::Room room;  // two threads may attend at once
    a.scratch = room.floats(kernels_->attend_floats(a));
    nb::gil_scoped_release release;
    kernels_->attend(a);
  }
};

}  // namespace

NB_MODULE(_kernels, m) {
  nb::set_leak_warnings(false);  // backends that live in modules keep their last step until the process ends
  m.def("supported_isas", &supported_isas, "Instruction sets that are compiled in and that this processor has, best first.");
  m.def("is_supported", &is_supported, nb::arg("isa"), "Whether an instruction set is one of those. No other one is asked for.");
  m.def(
      "tiles_bf16", [](const std::string& isa) { return stratakv::kernels_of(isa.c_str()).tiles_bf16; }, nb::arg("isa"),
      "Whether products with bf16 matrices want them in tiles.");
  m.def(
      "read_all",
      [](std::intptr_t words, std::int64_t n, int n_threads) {
        nb::gil_scoped_release release;
        return stratakv::read_all(at<const std::uint64_t>(words), n, n_threads);
      },
      "The sum of n 64-bit words, to measure how fast memory can be read.");
  m.def(
      "sample_of",
      [](std::intptr_t addresses, std::intptr_t sizes, std::int64_t n) {
        return stratakv::sample_of(at<const std::uint64_t>(addresses), at<const std::uint64_t>(sizes), n);
      },
      "A number that tells whether n stretches of memory were changed, from some of their bytes.");
  nb::class_<Append>(m, "Append")
      .def(nb::init<const std::string&>())
      .def("set_pages", &Append::set_pages)
      .def("set_member", &Append::set_member)
      .def("set_rows", &Append::set_rows)
      .def("run", &Append::run);
  nb::class_<Step>(m, "Step")
      .def(nb::init<const std::string&>())
      .def("set_pages", &Step::set_pages)
      .def("set_member", &Step::set_member)
      .def("set_rows", &Step::set_rows)
      .def("set_rules", &Step::set_rules)
      .def("set_mask", &Step::set_mask)
      .def("set_queries", &Step::set_queries)
      .def("is_prompt", &Step::is_prompt)
      .def("run", nb::overload_cast<std::intptr_t, std::intptr_t, const Strides&, std::intptr_t, const Strides&, std::intptr_t>(&Step::run))
      .def("run_after", &Step::run_after);
  stratakv::bind_runner(m);
}
