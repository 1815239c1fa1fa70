// The activation kernels of every variant that runs here, against the formulas in long double.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "../../csrc/cpu/numbers.h"
#include "../../csrc/cpu/variants.h"
#include "check.h"

using namespace gn_kernels;

namespace {

using Real = long double;

struct Exact {
  Real f, d1, d2;
};

Exact normal(Real x) {
  const Real cdf = std::erfc(-x / std::sqrt(Real(2))) / 2;
  const Real pdf = std::exp(-x * x / 2) / std::sqrt(2 * std::acos(Real(-1)));
  return {x * cdf, cdf + x * pdf, (2 - x * x) * pdf};
}

Exact gated(Real x, Real g, Real dg, Real ddg) {
  const Real s = 1 / (1 + std::exp(-g)), rest = 1 / (1 + std::exp(g));
  return {x * s, s + x * dg * s * rest, s * rest * (2 * dg + x * ddg + x * dg * dg * (rest - s))};
}

Exact exact(Kind kind, Real x) {
  switch (kind) {
    case Kind::Gelu: return normal(x);
    case Kind::GeluTanh: {
      const Real a = 2 * std::sqrt(2 / std::acos(Real(-1))), b = Real(44715) / 1000000;
      return gated(x, a * (x + b * x * x * x), a * (1 + 3 * b * x * x), a * 6 * b * x);
    }
    case Kind::Silu: return gated(x, x, 1, 0);
    case Kind::QuickGelu: return gated(x, Real(1702) / 1000 * x, Real(1702) / 1000, 0);
  }
  return {};
}

template <class T>
struct Results {
  std::vector<T> f, d1, d2, d1_again, d2_alone;
};

// All orders with cotangents of 1, so that f, f' and f'' themselves come out.
template <class T>
Results<T> run(const Kernels& kernels, Kind kind, Dtype dtype, const std::vector<T>& x, T one) {
  const std::size_t n = x.size();
  Results<T> r{std::vector<T>(n), std::vector<T>(n), std::vector<T>(n), std::vector<T>(n),
               std::vector<T>(n)};
  const std::vector<T> ones(n, one);
  const auto size = static_cast<std::int64_t>(n);
  kernels.forward(kind, dtype, x.data(), r.f.data(), size);
  kernels.backward(kind, dtype, ones.data(), x.data(), r.d1.data(), size);
  kernels.double_backward(kind, dtype, ones.data(), ones.data(), x.data(), r.d1_again.data(),
                          r.d2.data(), size);
  kernels.double_backward(kind, dtype, ones.data(), ones.data(), x.data(), nullptr,
                          r.d2_alone.data(), size);
  return r;
}

// In units of the rounding of numbers near 1: what a handful of roundings can add up to.
template <class T>
void test_wide(const char* isa, const Kernels& kernels, Kind kind, Dtype dtype) {
  std::vector<T> x;
  for (int i = -140000; i <= 140000; ++i) x.push_back(T(i) / 10000 + T(1e-5));
  const auto r = run<T>(kernels, kind, dtype, x, 1);
  const Real unit = std::numeric_limits<T>::epsilon() / 2;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const Exact e = exact(kind, x[i]);
    const Real scale = std::fmax(Real(1), std::fabs(Real(x[i])));
    CHECK(r.d1[i] == r.d1_again[i] && r.d2[i] == r.d2_alone[i], "%s at %.9g", isa, double(x[i]));
    CHECK(std::fabs(r.f[i] - e.f) <= 2 * unit * scale, "%s %d f(%.9g)", isa, int(kind),
          double(x[i]));
    CHECK(std::fabs(r.d1[i] - e.d1) <= 3 * unit, "%s %d f'(%.9g)", isa, int(kind), double(x[i]));
    CHECK(std::fabs(r.d2[i] - e.d2) <= 5 * unit, "%s %d f''(%.9g)", isa, int(kind), double(x[i]));
    // Relative accuracy of f in the left tail, where the exponential has an argument up to 90
    // that has been rounded three times.
    CHECK(x[i] < -10 || x[i] > 0 || std::fabs(r.f[i] - e.f) <= 400 * unit * std::fabs(e.f),
          "%s %d f(%.9g)", isa, int(kind), double(x[i]));
  }
}

struct Format16 {
  int digits, min_exponent;  // of the significand; of the smallest subnormal
  int exponent_bits;

  Real value(std::uint16_t bits) const {
    const int fraction_bits = digits - 1;
    const int exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1);
    const Real fraction = bits & ((1 << fraction_bits) - 1);
    const Real sign = bits & 0x8000 ? -1 : 1;
    if (exponent == (1 << exponent_bits) - 1) return fraction != 0 ? NAN : sign * INFINITY;
    return exponent == 0
               ? sign * std::ldexp(fraction, min_exponent)
               : sign * std::ldexp(fraction + (1 << fraction_bits), min_exponent + exponent - 1);
  }
  Real ulp(Real x) const {
    int exponent;
    std::frexp(x, &exponent);
    return std::ldexp(Real(1), std::max(exponent - digits, min_exponent));
  }
};

// Every number of the format: correctly rounded but for 1% of an ulp, for |x| <= 10.
void test_16_bits(const char* isa, const Kernels& kernels, Kind kind, Dtype dtype) {
  const Format16 format = dtype == Dtype::BFloat16 ? Format16{8, -133, 8} : Format16{11, -24, 5};
  const std::uint16_t one = dtype == Dtype::BFloat16 ? 0x3f80 : 0x3c00;
  std::vector<std::uint16_t> x;
  for (int bits = 0; bits < 65536; ++bits) x.push_back(std::uint16_t(bits));
  const auto r = run<std::uint16_t>(kernels, kind, dtype, x, one);
  for (int bits = 0; bits < 65536; ++bits) {
    const Real at = format.value(x[bits]);
    const Real values[] = {format.value(r.f[bits]), format.value(r.d1[bits]),
                           format.value(r.d2[bits])};
    const Exact e = exact(kind, at);
    const Real truths[] = {e.f, e.d1, e.d2};
    for (int order = 0; order < 3; ++order) {
      CHECK(std::isnan(values[order]) == std::isnan(at), "%s kind %d order %d at %g", isa,
            int(kind), order, double(at));
      if (std::isnan(at)) continue;
      CHECK(r.d1[bits] == r.d1_again[bits] && r.d2[bits] == r.d2_alone[bits], "%s at %g", isa,
            double(at));
      if (!(std::fabs(at) <= 10)) continue;
      const Real error = std::fabs(values[order] - truths[order]);
      CHECK(error <= Real(0.51) * format.ulp(truths[order]) + (order ? Real(4e-7) : 0),
            "%s kind %d order %d at %g", isa, int(kind), order, double(at));
    }
  }
}

// Conversion without special instructions: to nearest, ties to even, and NaN of any payload.
template <class H>
void test_conversions(Format16 format) {
  const int infinity = ((1 << format.exponent_bits) - 1) << (format.digits - 1);
  const auto rounded = [](double x) {
    H h;
    narrow(float(x), h);
    return int(h.bits);
  };
  for (int bits = 0; bits < infinity; ++bits) {
    const auto here = double(format.value(std::uint16_t(bits)));
    CHECK(widen(H{std::uint16_t(bits)}) == float(here), "%#x", bits);
    CHECK(rounded(here) == bits && rounded(-here) == (bits | 0x8000), "%#x", bits);
    if (bits + 1 == infinity) break;
    const auto next = double(format.value(std::uint16_t(bits + 1)));
    const float middle = float((here + next) / 2);
    CHECK(rounded(middle) == bits + (bits & 1), "a tie above %#x", bits);
    CHECK(rounded(std::nextafter(middle, 0.0f)) == bits, "below a tie above %#x", bits);
    CHECK(rounded(std::nextafter(middle, INFINITY)) == bits + 1, "above a tie above %#x", bits);
  }
  CHECK(rounded(INFINITY) == infinity && rounded(3.4e38) == infinity, "overflow");
  for (std::uint32_t payload : {0x7f800001u, 0x7fc00000u, 0x7fffffffu, 0xffffffffu}) {
    H h;
    narrow(bit_cast<float>(payload), h);
    CHECK((h.bits & 0x7fff) > infinity, "NaN %#x", payload);
  }
}

template <class T>
void test_limits(const Kernels& kernels, Kind kind, Dtype dtype) {
  const T inf = std::numeric_limits<T>::infinity(), huge = T(1e30);
  const auto r = run<T>(kernels, kind, dtype, {inf, -inf, huge, -huge, T(-0.0), T(0), T(1e-40)}, 1);
  CHECK(r.f[0] == inf && r.d1[0] == 1 && r.d2[0] == 0, "kind %d", int(kind));
  CHECK(r.f[1] == 0 && std::signbit(r.f[1]) && r.d1[1] == 0 && r.d2[1] == 0, "kind %d", int(kind));
  CHECK(r.f[2] == huge && r.d1[2] == 1 && r.d2[2] == 0, "kind %d", int(kind));
  CHECK(r.f[3] == 0 && std::signbit(r.f[3]) && r.d1[3] == 0 && r.d2[3] == 0, "kind %d", int(kind));
  CHECK(r.f[4] == 0 && std::signbit(r.f[4]) && r.d1[4] == T(0.5), "kind %d", int(kind));
  CHECK(r.f[5] == 0 && !std::signbit(r.f[5]) && r.d1[5] == T(0.5), "kind %d", int(kind));
  CHECK(r.f[6] == T(1e-40) / 2, "kind %d: a subnormal", int(kind));
}

// Any number of elements, at any address: the same bits as in one long run, nothing else written.
template <class T>
void test_bounds(const Kernels& kernels, Kind kind, Dtype dtype, T low, T step) {
  constexpr std::int64_t longest = 1100;
  std::vector<T> x(longest), whole(longest), out(longest + 2);
  for (std::int64_t i = 0; i < longest; ++i) x[i] = T(low + T(i) * step);
  kernels.double_backward(kind, dtype, x.data(), x.data(), x.data(), nullptr, whole.data(),
                          longest);
  const T guard = T(77);
  for (std::int64_t n : {0,   1,   2,   7,   8,   9,   15,  16,  17,  31,  33,  63,  64,   65,
                         127, 128, 129, 255, 256, 257, 319, 320, 321, 511, 512, 513, 1024, 1087}) {
    for (std::int64_t start : {0, 1, 13}) {
      const T* from = x.data() + start;
      std::fill(out.begin(), out.end(), guard);
      kernels.double_backward(kind, dtype, from, from, from, nullptr, out.data() + 1, n);
      const auto guards = std::count(out.begin() + n + 1, out.end(), guard);
      CHECK(out[0] == guard && guards == longest + 1 - n, "%d elements: written outside", int(n));
      CHECK(std::equal(out.begin() + 1, out.begin() + n + 1, whole.begin() + start),
            "%d elements from %d: other bits", int(n), int(start));
    }
  }
}

void test_variant(const char* isa, const Kernels& kernels) {
#define ROW(Activation, name)                                        \
  test_wide<float>(isa, kernels, Kind::Activation, Dtype::Float32);  \
  test_wide<double>(isa, kernels, Kind::Activation, Dtype::Float64); \
  test_16_bits(isa, kernels, Kind::Activation, Dtype::Float16);      \
  test_16_bits(isa, kernels, Kind::Activation, Dtype::BFloat16);     \
  test_limits<float>(kernels, Kind::Activation, Dtype::Float32);     \
  test_limits<double>(kernels, Kind::Activation, Dtype::Float64);
  GN_KERNELS_ACTIVATIONS(ROW)
#undef ROW
  test_bounds<float>(kernels, Kind::Gelu, Dtype::Float32, -5, 0.01f);
  test_bounds<double>(kernels, Kind::GeluTanh, Dtype::Float64, -5, 0.01);
  test_bounds<std::uint16_t>(kernels, Kind::Silu, Dtype::Float16, 0x3000, 1);
  test_bounds<std::uint16_t>(kernels, Kind::QuickGelu, Dtype::BFloat16, 0x3e00, 1);
}

// The arithmetic of the GPU's kernels for 16-bit types, executed here.
template <template <class, class> class Order, class A, class H, std::size_t I, std::size_t O>
void loop(const std::array<const H*, I>& in, const std::array<H*, O>& out, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    float arguments[I], results[O];
    for (std::size_t k = 0; k < I; ++k) arguments[k] = widen(in[k][i]);
    Order<A, Fast>::apply(arguments, results);
    for (std::size_t k = 0; k < O; ++k) narrow(results[k], out[k][i]);
  }
}

template <template <class, class> class Order, std::size_t I, std::size_t O>
void run_fast(Kind kind, Dtype dtype, const void* const (&in)[I], void* const (&out)[O],
              std::int64_t n) {
  const auto typed = [&](auto activation, auto element) {
    using H = decltype(element);
    std::array<const H*, I> from;
    std::array<H*, O> to;
    for (std::size_t k = 0; k < I; ++k) from[k] = static_cast<const H*>(in[k]);
    for (std::size_t k = 0; k < O; ++k) to[k] = static_cast<H*>(out[k]);
    loop<Order, decltype(activation), H>(from, to, n);
  };
  switch (kind) {
#define ROW(Activation, name)                                         \
  case Kind::Activation:                                              \
    return dtype == Dtype::BFloat16 ? typed(Activation{}, bfloat16{}) \
                                    : typed(Activation{}, float16{});
    GN_KERNELS_ACTIVATIONS(ROW)
#undef ROW
  }
}

const Kernels fast = {
    [](Kind kind, Dtype dtype, const void* x, void* y, std::int64_t n) {
      run_fast<Forward, 1, 1>(kind, dtype, {x}, {y}, n);
    },
    [](Kind kind, Dtype dtype, const void* grad, const void* x, void* grad_x, std::int64_t n) {
      run_fast<Backward, 2, 1>(kind, dtype, {grad, x}, {grad_x}, n);
    },
    [](Kind kind, Dtype dtype, const void* v, const void* grad, const void* x, void* grad_grad,
       void* grad_x, std::int64_t n) {
      if (grad_grad == nullptr) {
        run_fast<Curvature, 3, 1>(kind, dtype, {v, grad, x}, {grad_x}, n);
      } else {
        run_fast<DoubleBackward, 3, 2>(kind, dtype, {v, grad, x}, {grad_grad, grad_x}, n);
      }
    },
};

}  // namespace

int main() {
#define ROW(Activation, name)                                   \
  test_16_bits("fast", fast, Kind::Activation, Dtype::Float16); \
  test_16_bits("fast", fast, Kind::Activation, Dtype::BFloat16);
  GN_KERNELS_ACTIVATIONS(ROW)
#undef ROW
  test_conversions<float16>({11, -24, 5});
  test_conversions<bfloat16>({8, -133, 8});
#define ROW(isa, runs_here)                             \
  if (runs_here)                                        \
    test_variant(#isa, isa), std::printf("%s\n", #isa); \
  else                                                  \
    std::printf("%s: not on this processor\n", #isa);
  GN_KERNELS_VARIANTS(ROW)
#undef ROW
  std::printf("%d failures\n", failures);
  return failures != 0;
}
