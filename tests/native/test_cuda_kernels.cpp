// The CUDA kernels, executed on the CPU (cuda_on_host.h), against the formulas in long double.
// Every tensor ends where its page of memory ends: a read or a write beyond it stops the test.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "../../csrc/cpu/numbers.h"
#include "../../csrc/cuda/kernels.h"
#include "check.h"

using namespace gn_kernels;
using Real = long double;

namespace {

int dtype_size(Dtype dtype) {
  return dtype == Dtype::Float64 ? 8 : dtype == Dtype::Float32 ? 4 : 2;
}

Dtype wide_of(Dtype dtype) { return dtype == Dtype::Float64 ? dtype : Dtype::Float32; }

Real unit_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::Float16: return std::ldexp(Real(1), -11);
    case Dtype::BFloat16: return std::ldexp(Real(1), -8);
    case Dtype::Float32: return std::ldexp(Real(1), -24);
    case Dtype::Float64: return std::ldexp(Real(1), -53);
  }
  return 0;
}

// n numbers of a dtype, the last one at the end of a page; `gap` elements further to the front, so
// that vectors are not aligned.
class Tensor {
 public:
  Tensor(Dtype dtype, std::int64_t n, int gap = 0) : dtype(dtype), n(n) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const std::size_t bytes = static_cast<std::size_t>((n + gap) * dtype_size(dtype));
    size = (bytes + page - 1) / page * page + 2 * page;
    memory = static_cast<char*>(
        mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    std::memset(memory, 0xff, size);  // NaN
    mprotect(memory, page, PROT_NONE);
    mprotect(memory + size - page, page, PROT_NONE);
    data = memory + size - page - bytes;
  }
  Tensor(const Tensor&) = delete;
  ~Tensor() { munmap(memory, size); }

  Real operator[](std::int64_t i) const {
    const char* at = data + i * dtype_size(dtype);
    switch (dtype) {
      case Dtype::Float16: return widen(*reinterpret_cast<const float16*>(at));
      case Dtype::BFloat16: return widen(*reinterpret_cast<const bfloat16*>(at));
      case Dtype::Float32: return *reinterpret_cast<const float*>(at);
      case Dtype::Float64: return *reinterpret_cast<const double*>(at);
    }
    return 0;
  }

  void set(std::int64_t i, double x) {
    char* at = data + i * dtype_size(dtype);
    switch (dtype) {
      case Dtype::Float16: return narrow(float(x), *reinterpret_cast<float16*>(at));
      case Dtype::BFloat16: return narrow(float(x), *reinterpret_cast<bfloat16*>(at));
      case Dtype::Float32: *reinterpret_cast<float*>(at) = float(x); return;
      case Dtype::Float64: *reinterpret_cast<double*>(at) = x; return;
    }
  }

  const Dtype dtype;
  const std::int64_t n;
  char* data;

 private:
  char* memory;
  std::size_t size;
};

std::uint64_t state = 1;

double random_number() {  // about normal: a sum of 4 uniform ones
  double total = 0;
  for (int k = 0; k < 4; ++k) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    total += double(state >> 11) / 9007199254740992.0 - 0.5;
  }
  return total * 1.732;
}

void fill(Tensor& x, double scale = 1, double offset = 0) {
  for (std::int64_t i = 0; i < x.n; ++i) x.set(i, offset + scale * random_number());
}

// `roundings` are of the arithmetic, relative to the largest magnitude among the numbers; one is of
// the result itself. Rows of `length` may begin `pitch` numbers after each other.
void check_close(const char* what, const Tensor& got, const std::vector<Real>& expected,
                 Real roundings, std::int64_t length, std::int64_t pitch = 0) {
  Real largest = 0;
  for (const Real one : expected) largest = std::fmax(largest, std::fabs(one));
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const auto at = std::int64_t(i);
    const Real value = got[pitch == 0 ? at : at / length * pitch + at % length];
    const Real error = std::fabs(value - expected[i]);
    const Real allowed = unit_of(got.dtype) * std::fabs(expected[i]) +
                         roundings * unit_of(wide_of(got.dtype)) * largest +
                         (got.dtype == Dtype::Float16 ? std::ldexp(Real(1), -25) : 0);
    CHECK(error <= allowed, "%s: %Lg for %Lg at %zu, dtype %d, rows of %lld", what, value,
          expected[i], i, int(got.dtype), static_cast<long long>(length));
  }
}

// --- Activations: the same as one element at a time --------------------------------------------

template <class A, class P, class T>
void check_activation(Kind kind, Dtype dtype, std::int64_t n, int gap) {
  using R = typename P::real;
  Tensor x(dtype, n, gap), grad(dtype, n, gap), v(dtype, n), y(dtype, n, gap), dx(dtype, n),
      for_grad(dtype, n), for_x(dtype, n), alone(dtype, n);
  fill(x, 3);
  fill(grad);
  fill(v);
  cuda::activation_forward(kind, dtype, x.data, y.data, n, nullptr);
  cuda::activation_backward(kind, dtype, grad.data, x.data, dx.data, n, nullptr);
  cuda::activation_double_backward(kind, dtype, v.data, grad.data, x.data, for_grad.data,
                                   for_x.data, n, nullptr);
  cuda::activation_double_backward(kind, dtype, v.data, grad.data, x.data, nullptr, alone.data, n,
                                   nullptr);
  for (std::int64_t i = 0; i < n; ++i) {
    const auto at = jet<A, P>(R(x[i]));
    Tensor one(dtype, 4);
    one.set(0, at.f);
    one.set(1, R(grad[i]) * at.d1);
    one.set(2, R(v[i]) * at.d1);
    one.set(3, R(v[i]) * R(grad[i]) * at.d2);
    CHECK(y[i] == one[0] && dx[i] == one[1] && for_grad[i] == one[2] && for_x[i] == one[3] &&
              alone[i] == one[3],
          "kind %d dtype %d element %lld of %lld", int(kind), int(dtype), static_cast<long long>(i),
          static_cast<long long>(n));
  }
}

template <class A>
void test_activation(Kind kind) {
  for (const std::int64_t n : {0, 1, 5, 255, 256, 513, 1024, 2048, 2049, 4103}) {
    for (const int gap : {0, 1}) {
      check_activation<A, Fast, float16>(kind, Dtype::Float16, n, gap);
      check_activation<A, Fast, bfloat16>(kind, Dtype::BFloat16, n, gap);
      check_activation<A, Single, float>(kind, Dtype::Float32, n, gap);
      check_activation<A, Double, double>(kind, Dtype::Float64, n, gap);
    }
  }
}

// --- Layer normalisation
// --------------------------------------------------------------------------

Real mean(const std::vector<Real>& a) {
  Real sum = 0;
  for (const Real one : a) sum += one;
  return sum / Real(a.size());
}

template <class F>
std::vector<Real> row_of(std::int64_t n, F f) {
  std::vector<Real> row;
  for (std::int64_t j = 0; j < n; ++j) row.push_back(f(j));
  return row;
}

struct Options {
  bool weight, u, v, wide_parameters;
  int gap;
};

void test_layer_norm(Dtype dtype, std::int64_t rows, std::int64_t n, Options options) {
  const Dtype wide = wide_of(dtype), of_parameters = options.wide_parameters ? wide : dtype;
  const std::int64_t size = rows * n;
  Tensor x(dtype, size, options.gap), y(dtype, size), grad(dtype, size), v(dtype, size),
      for_x(dtype, size), second_x(dtype, size), for_grad(dtype, size, options.gap);
  Tensor w(of_parameters, n), b(of_parameters, n), u(of_parameters, n), t(of_parameters, n),
      for_w(of_parameters, n), for_b(of_parameters, n), second_w(of_parameters, n);
  Tensor mu(wide, rows), rstd(wide, rows);
  fill(x, 2, 1);
  fill(w, 0.5, 1);
  for (Tensor* one : {&grad, &v, &b, &u, &t}) fill(*one);
  const double eps = 1e-5;
  const cuda::LayerNorm a{dtype, of_parameters, rows, n};
  Tensor partials(wide, 2 * cuda::layer_norm_partials(a));
  const void* weight = options.weight ? w.data : nullptr;
  const void* of_weight = options.u ? u.data : nullptr;
  cuda::layer_norm_forward(a, x.data, weight, weight == nullptr ? nullptr : b.data, eps, y.data,
                           mu.data, rstd.data, nullptr);
  cuda::layer_norm_backward(a, grad.data, x.data, weight, mu.data, rstd.data, for_x.data,
                            for_w.data, for_b.data, partials.data, nullptr);
  cuda::layer_norm_double_backward(a, options.v ? v.data : nullptr, of_weight,
                                   options.u ? t.data : nullptr, grad.data, x.data, weight, mu.data,
                                   rstd.data, for_grad.data, second_x.data, second_w.data,
                                   partials.data, nullptr);

  std::vector<Real> ys, means, rstds, dx, ddx, dgrad;
  std::vector<Real> dw(std::size_t(n), 0), db(std::size_t(n), 0), ddw(std::size_t(n), 0);
  for (std::int64_t i = 0; i < rows; ++i) {
    const auto at = [&](const Tensor& tensor, std::int64_t j) { return tensor[i * n + j]; };
    const auto weight_at = [&](std::int64_t j) { return options.weight ? w[j] : Real(1); };
    const auto u_at = [&](std::int64_t j) { return options.u ? u[j] : Real(0); };
    const Real m = mean(row_of(n, [&](auto j) { return at(x, j); }));
    const Real r =
        1 / std::sqrt(mean(row_of(n, [&](auto j) { return (at(x, j) - m) * (at(x, j) - m); })) +
                      Real(eps));
    means.push_back(m);
    rstds.push_back(r);
    const auto x_hat = row_of(n, [&](auto j) { return (at(x, j) - m) * r; });
    const auto project = [&](const std::vector<Real>& one) {
      const Real mean_one = mean(one);
      const Real along = mean(row_of(n, [&](auto j) { return one[j] * x_hat[j]; }));
      return row_of(n, [&](auto j) { return one[j] - mean_one - x_hat[j] * along; });
    };
    const auto h = row_of(n, [&](auto j) { return at(grad, j) * weight_at(j); });
    const auto vs = row_of(n, [&](auto j) { return options.v ? at(v, j) : Real(0); });
    const auto ph = project(h), pv = project(vs);
    const auto pk = project(row_of(n, [&](auto j) { return at(grad, j) * u_at(j); }));
    const Real c = mean(row_of(n, [&](auto j) { return h[j] * x_hat[j]; }));
    const Real big_c = mean(row_of(n, [&](auto j) { return vs[j] * x_hat[j]; }));
    const Real d = mean(row_of(n, [&](auto j) { return vs[j] * ph[j]; }));
    for (std::int64_t j = 0; j < n; ++j) {
      const auto column = static_cast<std::size_t>(j);
      ys.push_back(x_hat[column] * weight_at(j) + (options.weight ? b[j] : 0));
      dx.push_back(r * ph[column]);
      dgrad.push_back(weight_at(j) * r * pv[column] + x_hat[column] * u_at(j) +
                      (options.u ? t[j] : 0));
      ddx.push_back(r * pk[column] -
                    r * r * (c * pv[column] + big_c * ph[column] + d * x_hat[column]));
      dw[column] += at(grad, j) * x_hat[column];
      db[column] += at(grad, j);
      ddw[column] += at(grad, j) * r * pv[column];
    }
  }
  // Some roundings for each number, and those of sums over a row or over the rows.
  const Real many = 20 + 2 * std::sqrt(Real(n)), most = many + 4 * Real(rows);
  check_close("y", y, ys, many, n);
  if (n <= 2)
    return;  // the gradients are differences of equal numbers: only their roundings remain
  check_close("mean", mu, means, many, n);
  check_close("rstd", rstd, rstds, many, n);
  check_close("for_x", for_x, dx, many, n);
  check_close("for_weight", for_w, dw, most, n);
  check_close("for_bias", for_b, db, most, n);
  check_close("for_grad", for_grad, dgrad, 2 * many, n);
  check_close("second for_x", second_x, ddx, 4 * many, n);
  check_close("second for_weight", second_w, ddw, 2 * most, n);
}

void test_layer_norms() {
  for (const Dtype dtype : {Dtype::Float16, Dtype::BFloat16, Dtype::Float32, Dtype::Float64}) {
    for (const std::int64_t n : {1, 2, 3, 7, 32, 49, 96, 255, 256, 260, 768, 1000}) {
      test_layer_norm(dtype, 7, n, {true, true, true, true, 0});
      test_layer_norm(dtype, 18, n, {true, false, true, false, 1});
      test_layer_norm(dtype, 1, n, {false, true, false, true, 0});
    }
    for (const std::int64_t n : {4096, 4104, 8192, 9001}) {
      test_layer_norm(dtype, 14, n, {true, true, true, true, 0});
    }
  }
}

// --- Softmax
// --------------------------------------------------------------------------------------

enum class Bias { None, Full, OfKeys, OfQueries, Masked };

std::int64_t padded(std::int64_t m, Dtype dtype) {
  const std::int64_t lanes = 16 / dtype_size(dtype);
  return (m + lanes - 1) / lanes * lanes;
}

// Rows of m numbers, NaN between them.
void fill_rows(Tensor& x, std::int64_t m, std::int64_t pitch, double scale = 1) {
  for (std::int64_t i = 0; i < x.n; ++i) {
    const double one = scale * random_number();
    x.set(i, i % pitch < m ? one : NAN);
  }
}

// Whether rows of scores, and of a bias, begin at multiples of 16 bytes; how far from them scores
// are.
struct Layout {
  bool padded, padded_bias;
  int gap;
};

void test_softmax(Dtype dtype, std::int64_t m, Bias kind, Layout layout, double scale = 0.25) {
  const std::int64_t batch = 4, heads = 2, n = 3, period = 2, rows = batch * heads * n;
  const std::int64_t pitch = layout.padded ? padded(m, dtype) : m, all = rows * pitch;
  const Dtype wide = wide_of(dtype);
  Tensor s(dtype, all, layout.gap), dp(dtype, all), ts(dtype, all), us(dtype, all);
  Tensor p(dtype, all), p_of_backward(dtype, all), p_again(dtype, all), g(dtype, all, layout.gap),
      ds(dtype, all), ds_again(dtype, all), as(dtype, all), log_sums(wide, rows);
  for (Tensor* one : {&s, &dp, &ts, &us}) fill_rows(*one, m, pitch, 2);
  cuda::SoftmaxBias bias, t_bias;
  const std::int64_t bias_pitch = layout.padded_bias ? padded(m, dtype) : m;
  const std::int64_t size = kind == Bias::OfKeys      ? bias_pitch
                            : kind == Bias::OfQueries ? n
                                                      : heads * n * bias_pitch;
  Tensor biases(dtype, period * size), t_biases(dtype, period * size);
  const bool of_queries = kind == Bias::OfQueries;
  fill_rows(biases, of_queries ? n : m, of_queries ? n : bias_pitch);
  fill_rows(t_biases, of_queries ? n : m, of_queries ? n : bias_pitch);
  if (kind == Bias::Masked) {  // a third of the scores, and the whole of the first row
    for (std::int64_t i = 0; i < biases.n; ++i) {
      if (i % bias_pitch < m && (i < m || i % 3 == 0)) biases.set(i, -INFINITY);
    }
  }
  if (kind != Bias::None) {
    bias.element = size;
    if (kind == Bias::OfKeys) bias.key = 1;
    if (kind == Bias::OfQueries) bias.query = 1;
    if (kind == Bias::Full || kind == Bias::Masked) {
      bias.head = n * bias_pitch, bias.query = bias_pitch, bias.key = 1;
    }
    t_bias = bias;
    bias.data = biases.data;
    t_bias.data = t_biases.data;
  }
  const cuda::Softmax a{dtype, rows, m, pitch, n, heads, period, scale};
  cuda::softmax_forward(a, s.data, bias, p.data, log_sums.data, nullptr);
  cuda::softmax_backward(a, s.data, bias, log_sums.data, dp.data, p_of_backward.data, ds.data,
                         nullptr);
  cuda::softmax_double_backward(a, s.data, bias, log_sums.data, dp.data, ts.data, t_bias, us.data,
                                p_again.data, g.data, ds_again.data, as.data, nullptr);
  const auto same_bits = [&](const Tensor& one, const Tensor& other, const char* what) {
    for (std::int64_t i = 0; i < all; ++i) {
      CHECK(i % pitch >= m || one[i] == other[i], "other bits of %s", what);
    }
  };
  same_bits(p_of_backward, p_again, "P");
  same_bits(ds, ds_again, "dS");

  std::vector<Real> ps, gs, dss, ass;
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t query = row % n, head = row / n % heads, element = row / n / heads % period;
    const auto with_bias = [&](const Tensor& scores, const cuda::SoftmaxBias& where,
                               const Tensor& from) {
      return row_of(m, [&](auto j) {
        const Real own = kind == Bias::None ? 0
                                            : from[element * where.element + head * where.head +
                                                   query * where.query + j * where.key];
        return Real(scale) * scores[row * pitch + j] + own;
      });
    };
    const auto score = with_bias(s, bias, biases), t = with_bias(ts, t_bias, t_biases);
    Real sum = 0;
    for (const Real one : score) sum += std::exp(one);
    if (sum == 0) CHECK(log_sums[row] == INFINITY, "a masked row");
    if (sum != 0) {
      CHECK(
          std::fabs(log_sums[row] - std::log(sum)) <= 40 * unit_of(wide) * (3 + std::log(Real(m))),
          "log-sum-exp %Lg for %Lg", log_sums[row], std::log(sum));
    }
    const auto prob = row_of(m, [&](auto j) { return sum == 0 ? 0 : std::exp(score[j]) / sum; });
    const auto total = [&](auto f) {
      Real all = 0;
      for (std::int64_t j = 0; j < m; ++j) all += f(j);
      return all;
    };
    const auto at = [&](const Tensor& tensor, std::int64_t j) { return tensor[row * pitch + j]; };
    const Real tau = total([&](auto j) { return prob[j] * t[j]; });
    const Real delta = total([&](auto j) { return prob[j] * at(dp, j); });
    const auto ap =
        row_of(m, [&](auto j) { return t[j] * (at(dp, j) - delta) - tau * at(dp, j) + at(us, j); });
    const Real rho = total([&](auto j) { return prob[j] * ap[j]; });
    for (std::int64_t j = 0; j < m; ++j) {
      ps.push_back(prob[j]);
      gs.push_back(prob[j] * (t[j] - tau));
      dss.push_back(prob[j] * (at(dp, j) - delta));
      ass.push_back(prob[j] * (ap[j] - rho));
    }
  }
  const Real many = 60 + 2 * std::sqrt(Real(m));
  check_close("P", p, ps, many, m, pitch);
  if (m == 1) return;  // the others are 0 but for roundings
  check_close("G", g, gs, 2 * many, m, pitch);
  check_close("dS", ds, dss, 2 * many, m, pitch);
  check_close("dS again", ds_again, dss, 2 * many, m, pitch);
  check_close("aS", as, ass, 8 * many, m, pitch);
}

// Rows in which every score is the lowest number there is, as masks are made: all are as probable.
void test_lowest(Dtype dtype, std::int64_t m) {
  const double lowest = dtype == Dtype::Float16   ? -65504
                        : dtype == Dtype::Float64 ? -std::numeric_limits<double>::max()
                                                  : -0x1.fep127;
  const std::int64_t rows = 3, pitch = padded(m, dtype), all = rows * pitch;
  Tensor s(dtype, all), p(dtype, all), log_sums(wide_of(dtype), rows);
  for (std::int64_t i = 0; i < all; ++i) s.set(i, lowest);
  const cuda::Softmax a{dtype, rows, m, pitch, rows, 1, 1, 1};
  cuda::softmax_forward(a, s.data, {}, p.data, log_sums.data, nullptr);
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t j = 0; j < m; ++j) {
      const Real error = std::fabs(p[row * pitch + j] * Real(m) - 1);
      CHECK(error <= 2 * unit_of(dtype), "%Lg of %d scores", p[row * pitch + j], int(m));
    }
  }
}

void test_softmaxes() {
  for (const Dtype dtype : {Dtype::Float16, Dtype::BFloat16, Dtype::Float32, Dtype::Float64}) {
    for (const Bias kind : {Bias::None, Bias::Full, Bias::OfKeys, Bias::OfQueries, Bias::Masked}) {
      for (const std::int64_t m : {1, 7, 49, 64, 65, 72, 197, 256, 577}) {
        test_softmax(dtype, m, kind, {false, false, int(m % 2)});
      }
      for (const std::int64_t m : {1, 7, 31, 33, 49, 63, 65, 100, 127, 197, 255, 257, 577}) {
        test_softmax(dtype, m, kind, {true, m % 4 == 1, 0});
      }
      test_softmax(dtype, 49, kind, {true, false, 0}, 1);
      test_softmax(dtype, 197, kind, {true, true, 0}, -1);
      test_softmax(dtype, 49, kind, {true, true, 1});
      test_softmax(dtype, 577, kind, {true, true, 0}, -1);
    }
    test_softmax(dtype, 4100, Bias::Full, {false, false, 0});
    test_softmax(dtype, 4101, Bias::Full, {true, true, 0});
    test_softmax(dtype, 4104, Bias::None, {false, false, 0});
    for (const std::int64_t m : {7, 49, 197, 577}) test_lowest(dtype, m);
  }
}

}  // namespace

int main() {
#define ROW(Activation, name) test_activation<Activation>(Kind::Activation);
  GN_KERNELS_ACTIVATIONS(ROW)
#undef ROW
  test_layer_norms();
  test_softmaxes();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
