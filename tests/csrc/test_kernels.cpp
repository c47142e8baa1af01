// Forward and backward of every instruction set and dtype against plain loops in double: for platforms whose kernels are
// built, or emulated, without Python.
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "isa.h"

#define ATMAN_ISA conversions
#include "simd_portable.h"

namespace {

using atman::conversions::BFloat;
using atman::conversions::Half;

struct Case {
  const char* name;
  // Queries, keys and prefix keys of each sequence.
  std::vector<std::vector<int>> lengths;
  int heads_q, heads_kv, head_dim;
  bool causal;
  int64_t window;
  bool has_bias;
};

const Case kCases[] = {
    {"lengths around a vector", {{1, 1, 0}, {3, 3, 0}, {17, 17, 0}, {0, 0, 0}}, 2, 1, 5, true, atman::kNoWindow, true},
    {"grouped heads", {{70, 70, 0}, {33, 33, 0}}, 6, 2, 64, true, atman::kNoWindow, true},
    {"full attention, no bias", {{40, 90, 0}}, 2, 2, 32, false, atman::kNoWindow, false},
    {"prefix", {{20, 20, 45}, {65, 65, 130}}, 2, 1, 16, true, atman::kNoWindow, true},
    {"window", {{150, 150, 0}}, 1, 1, 24, true, 37, true},
    {"more keys than a block keeps", {{600, 600, 0}}, 1, 1, 8, true, atman::kNoWindow, true},
};

template <class T>
struct Values {
  std::vector<T> stored;
  std::vector<double> exact;

  Values(size_t count, std::mt19937& random) : stored(count), exact(count) {
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < count; ++i) {
      atman::conversions::from_float(normal(random), stored[i]);
      exact[i] = atman::conversions::to_float(stored[i]);
    }
  }
};

struct Expected {
  std::vector<double> o, lse, dq, dk, dv, dkey_bias;
};

// Largest error over the largest magnitude, or infinity where one side alone is finite.
template <class T>
double error(const std::vector<T>& actual, const std::vector<double>& expected) {
  double worst = 0.0, scale = 1e-30;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double x = atman::conversions::to_float(actual[i]);
    if (std::isinf(expected[i]) && x == expected[i]) continue;
    if (!std::isfinite(x) || std::isinf(expected[i])) return INFINITY;
    worst = std::fmax(worst, std::fabs(x - expected[i]));
    scale = std::fmax(scale, std::fabs(expected[i]));
  }
  return worst / scale;
}

template <class T>
class Run {
 public:
  Run(const Case& c, const atman::Isa& isa, int threads)
      : c_(c),
        group_(c.heads_q / c.heads_kv),
        random_(7),
        rows_(total(0)),
        keys_(total(1)),
        prefix_(total(2)),
        q_(size(rows_, c.heads_q), random_),
        d_o_(size(rows_, c.heads_q), random_),
        k_(size(keys_, c.heads_kv), random_),
        v_(size(keys_, c.heads_kv), random_),
        prefix_k_(size(prefix_, c.heads_kv), random_),
        prefix_v_(size(prefix_, c.heads_kv), random_),
        bias_(static_cast<size_t>(keys_), random_),
        o_(q_.stored.size()),
        dq_(q_.stored.size()),
        dk_(k_.stored.size()),
        dv_(k_.stored.size()),
        lse_(static_cast<size_t>(rows_ * c.heads_q)),
        dkey_bias_(static_cast<size_t>(keys_)) {
    int32_t q = 0, k = 0, p = 0;
    for (const auto& n : c.lengths) {
      sequences_.push_back({0, q, n[0], k, n[1], p, n[2]});
      q += n[0], k += n[1], p += n[2];
    }
    compute(isa, threads);
    expect();
  }

  // Name and error of the worst result; a tolerance per dtype is the caller's.
  std::pair<const char*, double> worst() const {
    std::pair<const char*, double> found{"o", error(o_, expected_.o)};
    const auto compare = [&](const char* name, double e) {
      if (!(e <= found.second)) found = {name, e};
    };
    compare("lse", error(lse_, expected_.lse));
    compare("dq", error(dq_, expected_.dq));
    compare("dk", error(dk_, expected_.dk));
    compare("dv", error(dv_, expected_.dv));
    if (c_.has_bias) compare("dkey_bias", error(dkey_bias_, expected_.dkey_bias));
    return found;
  }

 private:
  int64_t total(size_t which) const {
    int64_t sum = 0;
    for (const auto& n : c_.lengths) sum += n[which];
    return sum;
  }
  size_t size(int64_t rows, int heads) const { return static_cast<size_t>(rows * heads * c_.head_dim); }
  atman::Tensor tensor(std::vector<T>& x, int heads) const {
    return {x.data(), 0, int64_t{heads} * c_.head_dim, c_.head_dim};
  }

  void compute(const atman::Isa& isa, int threads) {
    atman::Backward g{};
    g.dtype = std::is_same_v<T, float>  ? atman::Dtype::f32
              : std::is_same_v<T, Half> ? atman::Dtype::f16
                                        : atman::Dtype::bf16;
    g.batches = 1, g.rows = rows_, g.keys = keys_;
    g.head_dim = c_.head_dim, g.heads_q = c_.heads_q, g.heads_kv = c_.heads_kv;
    g.q = tensor(q_.stored, c_.heads_q), g.k = tensor(k_.stored, c_.heads_kv), g.v = tensor(v_.stored, c_.heads_kv);
    g.prefix_k = tensor(prefix_k_.stored, c_.heads_kv), g.prefix_v = tensor(prefix_v_.stored, c_.heads_kv);
    if (c_.has_bias) g.key_bias = {bias_.stored.data(), 0, 0, 1};
    g.sequences = sequences_.data(), g.n_seq = static_cast<int64_t>(sequences_.size());
    g.sm_scale = scale_ = 1.0f / std::sqrt(static_cast<float>(c_.head_dim));
    g.causal = c_.causal, g.window = c_.window;

    const atman::Kernels& kernels = atman::kernels_for(isa.name, g.dtype);
    atman::Forward f{};
    static_cast<atman::Problem&>(f) = g;
    f.o = tensor(o_, c_.heads_q);
    f.lse = {lse_.data(), 0, rows_, 1};
    atman::attention_forward(f, kernels, threads);
    g.o = f.o, g.lse = f.lse;
    g.d_o = tensor(d_o_.stored, c_.heads_q), g.dq = tensor(dq_, c_.heads_q);
    g.dk = tensor(dk_, c_.heads_kv), g.dv = tensor(dv_, c_.heads_kv);
    atman::attention_backward(g, c_.has_bias ? atman::Scalars{dkey_bias_.data(), 0, 0, 1} : atman::Scalars{}, kernels,
                              threads);
  }

  void expect() {
    Expected& x = expected_;
    x.o.resize(q_.exact.size()), x.dq.resize(q_.exact.size()), x.dk.resize(k_.exact.size());
    x.dv.resize(k_.exact.size()), x.lse.resize(lse_.size()), x.dkey_bias.resize(dkey_bias_.size());
    for (const atman::Sequence& s : sequences_)
      for (int head = 0; head < c_.heads_q; ++head)
        for (int row = 0; row < s.q_length; ++row) expect_row(s, head, row);
  }

  void expect_row(const atman::Sequence& s, int head, int row) {
    const int64_t D = c_.head_dim, n_keys = s.prefix_length + s.k_length, position = n_keys - s.q_length + row;
    const int64_t q_at = (int64_t{s.q_start + row} * c_.heads_q + head) * D;
    std::vector<double> p(static_cast<size_t>(n_keys)), dp(p.size());
    const auto own = [&](int64_t key) { return key >= s.prefix_length; };
    const auto at = [&](int64_t key) {
      const int64_t kv_row = own(key) ? s.k_start + key - s.prefix_length : s.prefix_start + key;
      return (kv_row * c_.heads_kv + head / group_) * D;
    };
    const auto bias_at = [&](int64_t key) { return static_cast<size_t>(s.k_start + key - s.prefix_length); };
    double sum = 0.0, delta = 0.0;
    for (int64_t key = 0; key < n_keys; ++key) {
      if (c_.causal && (key > position || (c_.window != atman::kNoWindow && key <= position - c_.window))) continue;
      const double* k = (own(key) ? k_ : prefix_k_).exact.data() + at(key);
      const double* v = (own(key) ? v_ : prefix_v_).exact.data() + at(key);
      double score = c_.has_bias && own(key) ? bias_.exact[bias_at(key)] : 0.0;
      for (int64_t d = 0; d < D; ++d) {
        score += scale_ * q_.exact[q_at + d] * k[d];
        dp[key] += d_o_.exact[q_at + d] * v[d];
      }
      sum += p[key] = std::exp(score);
    }
    expected_.lse[static_cast<size_t>(head * rows_ + s.q_start + row)] = std::log(sum);
    if (sum == 0.0) return;
    for (int64_t key = 0; key < n_keys; ++key) delta += (p[key] /= sum) * dp[key];
    for (int64_t key = 0; key < n_keys; ++key) {
      const double ds = p[key] * (dp[key] - delta);
      const double* k = (own(key) ? k_ : prefix_k_).exact.data() + at(key);
      const double* v = (own(key) ? v_ : prefix_v_).exact.data() + at(key);
      for (int64_t d = 0; d < D; ++d) {
        expected_.o[q_at + d] += p[key] * v[d];
        expected_.dq[q_at + d] += scale_ * ds * k[d];
        if (!own(key)) continue;
        expected_.dk[at(key) + d] += scale_ * ds * q_.exact[q_at + d];
        expected_.dv[at(key) + d] += p[key] * d_o_.exact[q_at + d];
      }
      if (own(key)) expected_.dkey_bias[bias_at(key)] += ds;
    }
  }

  const Case& c_;
  int group_;
  std::mt19937 random_;
  int64_t rows_, keys_, prefix_;
  Values<T> q_, d_o_, k_, v_, prefix_k_, prefix_v_;
  Values<float> bias_;
  std::vector<T> o_, dq_, dk_, dv_;
  std::vector<float> lse_, dkey_bias_;
  std::vector<atman::Sequence> sequences_;
  float scale_ = 0.0f;
  Expected expected_;
};

template <class T>
int check(const char* dtype, double tolerance) {
  int failures = 0;
  for (const atman::Isa& isa : atman::available_isas()) {
    for (const Case& c : kCases) {
      for (const int threads : {1, 3}) {
        const auto [name, e] = Run<T>(c, isa, threads).worst();
        if (e <= tolerance) continue;
        std::printf("%s %s, %s, %d threads: %s is off by %.1e of its largest value, allowed %.1e\n",
                    std::string(isa.name).c_str(), dtype, c.name, threads, name, e, tolerance);
        ++failures;
      }
    }
    if (failures == 0) std::printf("%s %s: passed\n", std::string(isa.name).c_str(), dtype);
  }
  return failures;
}

}  // namespace

int main() {
  // Rounding of one operation, times what it may grow to over a row.
  const int failures = check<float>("float32", 0x1p-23 * 16) + check<Half>("float16", 0x1p-11 * 4) +
                       check<BFloat>("bfloat16", 0x1p-8 * 4);
  return failures == 0 ? 0 : 1;
}
