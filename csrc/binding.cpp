// The Python module: reads and checks the arguments, releases the GIL, computes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "array.h"
#include "attention.h"
#include "isa.h"
#include "statistics.h"

namespace nb = nanobind;

namespace atman {
namespace {

constexpr int64_t kMaxHeadDim = 256;

Dtype float_dtype(const Array& array) {
  const nb::dlpack::dtype t = array.dtype;
  if (t.lanes == 1) {
    if (t.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) && t.bits == 32) return Dtype::f32;
    if (t.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) && t.bits == 16) return Dtype::f16;
    if (t.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat) && t.bits == 16) return Dtype::bf16;
  }
  array.reject("must be float32, float16 or bfloat16");
}

void expect_shape(const Array& array, const std::vector<int64_t>& shape) {
  bool same = array.ndim == static_cast<int>(shape.size());
  std::string wanted = "(";
  for (size_t i = 0; i < shape.size(); ++i) {
    same = same && array.shape[i] == shape[i];
    wanted += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  if (!same) array.reject("must have shape " + wanted + "), got " + array.shape_text());
}

// A (batch, row, head, head_dim) tensor, or (row, head, head_dim) with one batch row.
Tensor heads_tensor(const Array& array, Dtype dtype) {
  if (float_dtype(array) != dtype) array.reject("differs from q in dtype");
  const int last = array.ndim - 1;
  if (array.shape[last] > 1 && array.stride[last] != 1) array.reject("must have a unit stride along head_dim");
  return {array.data, array.ndim == 4 ? array.stride[0] : 0, array.stride[last - 2], array.stride[last - 1]};
}

Scalars float_tensor(const Array& array) {
  if (float_dtype(array) != Dtype::f32) array.reject("must be float32");
  const int last = array.ndim - 1;
  return {static_cast<float*>(array.data), array.stride[0], array.ndim == 3 ? array.stride[1] : 0, array.stride[last]};
}

void check_sequences(const Problem& p, int64_t prefix_rows) {
  const auto inside = [](int64_t start, int64_t length, int64_t total) {
    return start >= 0 && length >= 0 && start + length <= total;
  };
  for (int64_t i = 0; i < p.n_seq; ++i) {
    const Sequence& s = p.sequences[i];
    const char* wrong = nullptr;
    if (s.batch < 0 || s.batch >= p.batches) wrong = "batch row";
    if (!inside(s.q_start, s.q_length, p.rows)) wrong = "query range";
    if (!inside(s.k_start, s.k_length, p.keys)) wrong = "key range";
    if (!inside(s.prefix_start, s.prefix_length, s.prefix_length > 0 ? prefix_rows : INT32_MAX * int64_t{2}))
      wrong = "prefix range";
    if (wrong != nullptr)
      throw nb::value_error(("the " + std::string(wrong) + " of sequence " + std::to_string(i) +
                             " lies outside the tensors").c_str());
  }
}

// The arguments that forward and backward share.
struct Operands {
  Array q, k, v;
  std::optional<Array> key_bias, prefix_k, prefix_v;
  Array sequences;

  Operands(nb::handle q_, nb::handle k_, nb::handle v_, nb::handle key_bias_, nb::handle prefix_k_,
           nb::handle prefix_v_, nb::handle sequences_)
      : q("q", q_), k("k", k_), v("v", v_), sequences("sequences", sequences_) {
    if (!key_bias_.is_none()) key_bias.emplace("key_bias", key_bias_);
    if (!prefix_k_.is_none()) prefix_k.emplace("prefix_k", prefix_k_);
    if (!prefix_v_.is_none()) prefix_v.emplace("prefix_v", prefix_v_);
  }

  void fill(Problem& p, double sm_scale, bool causal, int64_t window) const {
    if (q.ndim != 4) q.reject("must have shape (B, T, H, D), got " + q.shape_text());
    if (k.ndim != 4) k.reject("must have shape (B, T, H, D), got " + k.shape_text());
    p.dtype = float_dtype(q);
    p.batches = q.shape[0], p.rows = q.shape[1], p.heads_q = q.shape[2], p.head_dim = q.shape[3];
    p.keys = k.shape[1], p.heads_kv = k.shape[2];
    if (p.head_dim < 1 || p.head_dim > kMaxHeadDim)
      q.reject("has head_dim " + std::to_string(p.head_dim) + ", supported are 1 to " + std::to_string(kMaxHeadDim));
    if (p.heads_kv < 1 || p.heads_q < 1 || p.heads_q % p.heads_kv != 0)
      q.reject("has " + std::to_string(p.heads_q) + " heads, not a positive multiple of the " +
               std::to_string(p.heads_kv) + " of k");
    expect_shape(k, {p.batches, p.keys, p.heads_kv, p.head_dim});
    expect_shape(v, {p.batches, p.keys, p.heads_kv, p.head_dim});
    p.q = heads_tensor(q, p.dtype), p.k = heads_tensor(k, p.dtype), p.v = heads_tensor(v, p.dtype);
    if (key_bias) {
      expect_shape(*key_bias, {p.batches, p.keys});
      p.key_bias = float_tensor(*key_bias);
    }
    if (prefix_k.has_value() != prefix_v.has_value())
      throw nb::value_error("prefix_k and prefix_v are given together, or neither");
    if (prefix_k) {
      expect_shape(*prefix_k, {prefix_k->shape[0], p.heads_kv, p.head_dim});
      expect_shape(*prefix_v, {prefix_k->shape[0], p.heads_kv, p.head_dim});
      p.prefix_k = heads_tensor(*prefix_k, p.dtype), p.prefix_v = heads_tensor(*prefix_v, p.dtype);
    }
    const nb::dlpack::dtype int32{static_cast<uint8_t>(nb::dlpack::dtype_code::Int), 32, 1};
    expect_shape(sequences, {sequences.shape[0], 7});
    if (sequences.dtype != int32) sequences.reject("must be int32");
    if (sequences.shape[0] > 0 && (sequences.stride[1] != 1 || (sequences.shape[0] > 1 && sequences.stride[0] != 7)))
      sequences.reject("must be contiguous");
    p.sequences = static_cast<const Sequence*>(sequences.data);
    p.n_seq = sequences.shape[0];
    p.sm_scale = static_cast<float>(sm_scale);
    p.causal = causal;
    p.window = std::min(window, kNoWindow);
    if (window < 1 || (window < kNoWindow && !causal))
      throw nb::value_error("window must be at least 1 and needs causal=True");
    check_sequences(p, prefix_k ? prefix_k->shape[0] : 0);
  }
};

void check_threads(int threads) {
  if (threads < 1) throw nb::value_error(("threads must be at least 1, got " + std::to_string(threads)).c_str());
}

void forward(nb::handle o, nb::handle lse, nb::handle q, nb::handle k, nb::handle v, nb::handle key_bias,
             nb::handle prefix_k, nb::handle prefix_v, nb::handle sequences, double sm_scale, bool causal,
             int64_t window, int threads, const std::string& isa, nb::handle distance) {
  const Operands operands(q, k, v, key_bias, prefix_k, prefix_v, sequences);
  const Array o_array("o", o), lse_array("lse", lse);
  check_threads(threads);
  Forward f{};
  operands.fill(f, sm_scale, causal, window);
  const Kernels& kernels = kernels_for(isa, f.dtype);
  expect_shape(o_array, {f.batches, f.rows, f.heads_q, f.head_dim});
  expect_shape(lse_array, {f.batches, f.heads_q, f.rows});
  f.o = heads_tensor(o_array, f.dtype);
  f.lse = float_tensor(lse_array);
  std::optional<Array> distance_array;
  if (!distance.is_none()) {
    if (!causal) throw nb::value_error("distance needs causal=True");
    expect_shape(distance_array.emplace("distance", distance), {f.batches, f.heads_q, f.rows});
    f.distance = float_tensor(*distance_array);
  }
  nb::gil_scoped_release release;
  attention_forward(f, kernels, threads);
}

void backward(nb::handle dq, nb::handle dk, nb::handle dv, nb::handle dkey_bias, nb::handle d_o, nb::handle dlse,
              nb::handle o, nb::handle lse, nb::handle q, nb::handle k, nb::handle v, nb::handle key_bias,
              nb::handle prefix_k, nb::handle prefix_v, nb::handle sequences, double sm_scale, bool causal,
              int64_t window, int threads, const std::string& isa) {
  const Operands operands(q, k, v, key_bias, prefix_k, prefix_v, sequences);
  const Array d_o_array("do", d_o), o_array("o", o), lse_array("lse", lse);
  check_threads(threads);
  Backward g{};
  operands.fill(g, sm_scale, causal, window);
  const Kernels& kernels = kernels_for(isa, g.dtype);
  const std::vector<int64_t> like_q{g.batches, g.rows, g.heads_q, g.head_dim};
  const std::vector<int64_t> like_k{g.batches, g.keys, g.heads_kv, g.head_dim};
  const std::vector<int64_t> like_lse{g.batches, g.heads_q, g.rows};
  const auto read_heads = [&](const Array& array, const std::vector<int64_t>& shape) {
    expect_shape(array, shape);
    return heads_tensor(array, g.dtype);
  };
  g.d_o = read_heads(d_o_array, like_q);
  g.o = read_heads(o_array, like_q);
  expect_shape(lse_array, like_lse);
  g.lse = float_tensor(lse_array);
  std::optional<Array> dlse_array, dq_array, dk_array, dv_array, dkey_bias_array;
  if (!dlse.is_none()) {
    expect_shape(dlse_array.emplace("dlse", dlse), like_lse);
    g.dlse = float_tensor(*dlse_array);
  }
  if (!dq.is_none()) g.dq = read_heads(dq_array.emplace("dq", dq), like_q);
  if (!dk.is_none()) g.dk = read_heads(dk_array.emplace("dk", dk), like_k);
  if (!dv.is_none()) g.dv = read_heads(dv_array.emplace("dv", dv), like_k);
  Scalars bias_gradient;
  if (!dkey_bias.is_none()) {
    expect_shape(dkey_bias_array.emplace("dkey_bias", dkey_bias), {g.batches, g.keys});
    bias_gradient = float_tensor(*dkey_bias_array);
  }
  nb::gil_scoped_release release;
  attention_backward(g, bias_gradient, kernels, threads);
}

void statistics(nb::handle distance, nb::handle windowed, nb::handle received, nb::handle received_count, nb::handle q,
                nb::handle k, nb::handle lse, nb::handle key_bias, nb::handle prefix_k, nb::handle rows,
                nb::handle sequences, double sm_scale, int64_t attention_window, int64_t window, int64_t low,
                int64_t high, int threads, const std::string& isa) {
  const Operands operands(q, k, k, key_bias, prefix_k, prefix_k, sequences);
  const Array windowed_array("windowed", windowed), received_array("received", received);
  const Array count_array("received_count", received_count), lse_array("lse", lse);
  check_threads(threads);
  Statistics p{};
  operands.fill(p, sm_scale, true, attention_window);
  const Kernels& kernels = kernels_for(isa, p.dtype);
  if (window < 1 || low < 0 || high < low)
    throw nb::value_error("window must be at least 1 and the horizon 0 <= low <= high");
  const std::vector<int64_t> like_lse{p.batches, p.heads_q, p.rows};
  expect_shape(lse_array, like_lse);
  expect_shape(windowed_array, like_lse);
  expect_shape(received_array, {p.batches, p.heads_q, p.keys});
  p.lse = float_tensor(lse_array);
  p.received = float_tensor(received_array);
  p.low = low, p.high = high;
  const nb::dlpack::dtype int32{static_cast<uint8_t>(nb::dlpack::dtype_code::Int), 32, 1};
  expect_shape(count_array, {p.batches, p.keys});
  if (count_array.dtype != int32) count_array.reject("must be int32");
  if (p.keys > 1 && count_array.stride[1] != 1) count_array.reject("must have a unit stride along its keys");
  p.stride_count = count_array.stride[0];
  std::optional<Array> distance_array, rows_array;
  float* distance_data = nullptr;
  if (!distance.is_none()) {
    expect_shape(distance_array.emplace("distance", distance), {p.n_seq, p.heads_q});
    if (float_dtype(*distance_array) != Dtype::f32) distance_array->reject("must be float32");
    if (p.n_seq > 1 && distance_array->stride[0] != p.heads_q) distance_array->reject("must be contiguous");
    distance_data = static_cast<float*>(distance_array->data);
  }
  if (!rows.is_none()) {
    expect_shape(rows_array.emplace("rows", rows), {p.batches, p.rows});
    const nb::dlpack::dtype uint8{static_cast<uint8_t>(nb::dlpack::dtype_code::UInt), 8, 1};
    if (rows_array->dtype != uint8) rows_array->reject("must be uint8");
    if (p.rows > 1 && rows_array->stride[1] != 1) rows_array->reject("must have a unit stride along its rows");
    p.rows_chosen = static_cast<const uint8_t*>(rows_array->data);
    p.stride_chosen = rows_array->stride[0];
  }
  const Scalars windowed_sums = float_tensor(windowed_array);
  nb::gil_scoped_release release;
  attention_statistics(p, windowed_sums, distance_data, static_cast<int32_t*>(count_array.data), window, kernels,
                       threads);
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (const Isa& isa : available_isas()) names.emplace_back(isa.name);
  return names;
}

}  // namespace
}  // namespace atman

NB_MODULE(_C, m) {
  m.doc() = "Attention with a key bias on CPUs; called by atman_kernels._cpu.";
  m.def("attention_forward", &atman::forward, nb::arg("o"), nb::arg("lse"), nb::arg("q"), nb::arg("k"), nb::arg("v"),
        nb::arg("key_bias").none(), nb::arg("prefix_k").none(), nb::arg("prefix_v").none(), nb::arg("sequences"),
        nb::arg("sm_scale"), nb::arg("causal"), nb::arg("window"), nb::arg("threads"), nb::arg("isa") = "",
        nb::arg("distance") = nb::none(),
        "Writes o, lse and, unless it is None, the distance of each row; window 2^30 means none.");
  m.def("attention_backward", &atman::backward, nb::arg("dq").none(), nb::arg("dk").none(), nb::arg("dv").none(),
        nb::arg("dkey_bias").none(), nb::arg("do"), nb::arg("dlse").none(), nb::arg("o"), nb::arg("lse"), nb::arg("q"),
        nb::arg("k"), nb::arg("v"), nb::arg("key_bias").none(), nb::arg("prefix_k").none(), nb::arg("prefix_v").none(),
        nb::arg("sequences"), nb::arg("sm_scale"), nb::arg("causal"), nb::arg("window"), nb::arg("threads"),
        nb::arg("isa") = "", "Writes the gradients that are not None.");
  m.def("attention_statistics", &atman::statistics, nb::arg("distance").none(), nb::arg("windowed"),
        nb::arg("received"), nb::arg("received_count"), nb::arg("q"), nb::arg("k"), nb::arg("lse"),
        nb::arg("key_bias").none(), nb::arg("prefix_k").none(), nb::arg("rows").none(), nb::arg("sequences"),
        nb::arg("sm_scale"), nb::arg("attention_window"), nb::arg("window"), nb::arg("low"), nb::arg("high"),
        nb::arg("threads"), nb::arg("isa") = "", "Writes the statistics that are not None; attention_window 2^30: none.");
  m.def("isas", &atman::isa_names, "Instruction sets this processor runs, best first.");
}
