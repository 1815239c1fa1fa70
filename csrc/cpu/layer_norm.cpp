// Compiled several times, as kernels.cpp is, and local to this file for the same reason.
#include "layer_norm.h"

#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../layer_norm.h"
#include "numbers.h"
#include "vectors.h"

namespace gn_kernels::layer_norm {
namespace {

// Sums are made of sums of so many numbers: the error grows with the number of those, not of all.
constexpr std::int64_t kChunk = 512;

template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

template <class T>
constexpr bool is_narrow = sizeof(T) == 2;

// Row i of a tensor of T as wide numbers: itself, or a copy in `buffer`.
template <class T, class R>
GN_INLINE const R* read(const void* tensor, std::int64_t i, std::int64_t n, R* buffer) {
  const T* row = static_cast<const T*>(tensor) + i * n;
  if constexpr (is_narrow<T>) {
    gn_kernels::widen(row, buffer, n);
    return buffer;
  } else {
    return row;
  }
}

// Where row i of a tensor of T is computed: there, or in `buffer`, for `written` to round.
template <class T, class R>
GN_INLINE R* place(void* tensor, std::int64_t i, std::int64_t n, R* buffer) {
  if constexpr (is_narrow<T>)
    return buffer;
  else
    return static_cast<T*>(tensor) + i * n;
}

template <class T, class R>
GN_INLINE void written(const R* wide, void* tensor, std::int64_t i, std::int64_t n) {
  if constexpr (is_narrow<T>) gn_kernels::narrow(wide, static_cast<T*>(tensor) + i * n, n);
}

// Calls f(j, V()) for all numbers of a row, with V a vector that begins at j, and at the end of the
// row a single number.
template <class R, class F>
GN_INLINE void for_row(std::int64_t n, F f) {
  std::int64_t j = 0;
  for (; j + kLanes<R> <= n; j += kLanes<R>) f(j, Vector<R>{});
  for (; j < n; ++j) f(j, R{});
}

template <class R, int count>
struct Sums {
  R of[count];
};

// `count` sums over a row. f(j, sums) adds to each of them what belongs to the numbers at j, as
// many as sums[0] holds: a vector or one. Few sums go in two sets side by side, so that an addition
// does not wait for the one before.
template <class R, int count, class F>
GN_INLINE Sums<R, count> sum_row(std::int64_t n, F f) {
  using V = Vector<R>;
  constexpr int lanes = kLanes<R>, sets = count > 4 ? 1 : 2;
  V total[count] = {};
  std::int64_t j = 0;
  while (j + lanes <= n) {
    const std::int64_t end = n < j + kChunk ? n : j + kChunk;
    V first[count] = {}, second[count] = {};
    for (; j + sets * lanes <= end; j += sets * lanes) {
      f(j, first);
      if constexpr (sets == 2) f(j + lanes, second);
    }
    if (j + lanes <= end) {
      f(j, second);
      j += lanes;
    }
    for (int k = 0; k < count; ++k) total[k] += first[k] + second[k];
  }
  R rest[count] = {};
  for (; j < n; ++j) f(j, rest);
  Sums<R, count> sums;
  for (int k = 0; k < count; ++k) {
    sums.of[k] = rest[k];
    for (int width = lanes / 2; width > 0; width /= 2) {
      for (int l = 0; l < width; ++l) total[k][l] += total[k][l + width];
    }
    sums.of[k] += total[k][0];
  }
  return sums;
}

template <class S>
using Element = std::remove_reference_t<decltype(std::declval<S>()[0])>;

template <class T, class R = Wide<T>>
void forward(const Forward& a, Rows rows, R* scratch) {
  const std::int64_t n = rows.length;
  const R* w = static_cast<const R*>(a.weight);
  const R* b = static_cast<const R*>(a.bias);
  for (std::int64_t i = rows.begin; i < rows.end; ++i) {
    const R* x = read<T>(a.x, i, n, scratch);
    R* y = place<T>(a.y, i, n, scratch + n);
    // Relative to its first number a constant row is exactly 0, and its variance too. Relative to
    // the mean that this gives, what is left of the mean corrects it.
    const R shift = x[0];
    const auto first = sum_row<R, 1>(n, [&](std::int64_t j, auto* sums) {
      sums[0] += load<Element<decltype(sums)>>(x + j) - shift;
    });
    const R about = shift + first.of[0] / R(n);
    const auto moments = sum_row<R, 2>(n, [&](std::int64_t j, auto* sums) {
      const auto left = load<Element<decltype(sums)>>(x + j) - about;
      sums[0] += left;
      sums[1] += left * left;
    });
    const R rest = moments.of[0] / R(n), mean = about + rest;
    const R variance = moments.of[1] / R(n) - rest * rest;
    const R r = 1 / std::sqrt((variance < 0 ? R(0) : variance) + R(a.eps));
    for_row<R>(n, [&](std::int64_t j, auto one) {
      using V = decltype(one);
      store<V>(y + j, (load<V>(x + j) - mean) * r * load<V>(w + j) + load<V>(b + j));
    });
    written<T>(y, a.y, i, n);
    static_cast<R*>(a.mean)[i] = mean;
    static_cast<R*>(a.rstd)[i] = r;
  }
}

template <class V, class R>
GN_INLINE void add(R* sums, std::int64_t j, V value) {
  if (sums != nullptr) store<V>(sums + j, load<V>(sums + j) + value);
}

template <class T, class R = Wide<T>>
void backward(const Backward& a, Rows rows, R* scratch) {
  const std::int64_t n = rows.length;
  const R* w = static_cast<const R*>(a.weight);
  R* sum_for_weight = static_cast<R*>(a.sum_for_weight);
  R* sum_for_bias = static_cast<R*>(a.sum_for_bias);
  for (std::int64_t i = rows.begin; i < rows.end; ++i) {
    const R* g = read<T>(a.grad, i, n, scratch);
    if (a.for_x == nullptr && sum_for_weight == nullptr) {
      for_row<R>(
          n, [&](std::int64_t j, auto one) { add(sum_for_bias, j, load<decltype(one)>(g + j)); });
      continue;
    }
    const R* x = read<T>(a.x, i, n, scratch + n);
    const R mean = static_cast<const R*>(a.mean)[i], r = static_cast<const R*>(a.rstd)[i];
    const auto means = sum_row<R, 2>(n, [&](std::int64_t j, auto* sums) {
      using V = Element<decltype(sums)>;
      const V z = (load<V>(x + j) - mean) * r, g_here = load<V>(g + j), h = g_here * load<V>(w + j);
      sums[0] += h;
      sums[1] += h * z;
      add(sum_for_weight, j, g_here * z);
      add(sum_for_bias, j, g_here);
    });
    if (a.for_x == nullptr) continue;
    const Projection<R> of_h{r, means.of[0] / R(n), means.of[1] / R(n)};
    R* out = place<T>(a.for_x, i, n, scratch + 2 * n);
    for_row<R>(n, [&](std::int64_t j, auto one) {
      using V = decltype(one);
      const V z = (load<V>(x + j) - mean) * r;
      store<V>(out + j, of_h(load<V>(g + j) * load<V>(w + j), z));
    });
    written<T>(out, a.for_x, i, n);
  }
}

template <class T, bool HAS_V, bool HAS_U, class R = Wide<T>>
void double_backward(const DoubleBackward& a, Rows rows, R* scratch) {
  const std::int64_t n = rows.length;
  const R* w = static_cast<const R*>(a.weight);
  const R* u = static_cast<const R*>(a.u);
  const R* t = static_cast<const R*>(a.t);
  R* sum_for_weight = HAS_V ? static_cast<R*>(a.sum_for_weight) : nullptr;
  for (std::int64_t i = rows.begin; i < rows.end; ++i) {
    const R* x = read<T>(a.x, i, n, scratch);
    const R* g = read<T>(a.grad, i, n, scratch + n);
    const R* v = HAS_V ? read<T>(a.v, i, n, scratch + 2 * n) : nullptr;
    const R mean = static_cast<const R*>(a.mean)[i], r = static_cast<const R*>(a.rstd)[i];

    const auto sums = sum_row<R, 7>(n, [&](std::int64_t j, auto* sums) {
      using V = Element<decltype(sums)>;
      const V z = (load<V>(x + j) - mean) * r, g_here = load<V>(g + j);
      if constexpr (HAS_V) {
        const V h = g_here * load<V>(w + j), v_here = load<V>(v + j);
        sums[0] += h;
        sums[1] += h * z;
        sums[2] += v_here;
        sums[3] += v_here * z;
        sums[4] += v_here * h;
      }
      if constexpr (HAS_U) {
        const V k = g_here * load<V>(u + j);
        sums[5] += k;
        sums[6] += k * z;
      }
    });
    const auto projection = [&](int k) {
      return Projection<R>{r, sums.of[k] / R(n), sums.of[k + 1] / R(n)};
    };
    const Projection<R> of_h = projection(0), of_v = projection(2), of_k = projection(5);
    const Curvature<R> curvature(of_v, of_h, sums.of[4] / R(n));

    R* for_grad = nullptr;
    R* for_x = nullptr;
    if (a.for_grad != nullptr) for_grad = place<T>(a.for_grad, i, n, scratch + 3 * n);
    if (a.for_x != nullptr) for_x = place<T>(a.for_x, i, n, scratch + 4 * n);
    for_row<R>(n, [&](std::int64_t j, auto one) {
      using V = decltype(one);
      const V z = (load<V>(x + j) - mean) * r, g_here = load<V>(g + j);
      const V w_here = load<V>(w + j);
      V grad = load<V>(t + j), dx = {};
      if constexpr (HAS_V) {
        const V r_pv = of_v(load<V>(v + j), z);
        grad += r_pv * w_here;
        dx += curvature(r_pv, g_here * w_here, z);
        add(sum_for_weight, j, g_here * r_pv);
      }
      if constexpr (HAS_U) {
        const V u_here = load<V>(u + j);
        grad += z * u_here;
        dx += of_k(g_here * u_here, z);
      }
      if (for_grad != nullptr) store<V>(for_grad + j, grad);
      if (for_x != nullptr) store<V>(for_x + j, dx);
    });
    if (for_grad != nullptr) written<T>(for_grad, a.for_grad, i, n);
    if (for_x != nullptr) written<T>(for_x, a.for_x, i, n);
  }
}

// Calls f(element), an object of the type that a dtype names.
template <class F>
void with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::Float16: return f(float16{});
    case Dtype::BFloat16: return f(bfloat16{});
    case Dtype::Float32: return f(float{});
    case Dtype::Float64: return f(double{});
  }
}

void forward(Dtype dtype, Forward a, Rows rows, void* scratch) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    forward<T>(a, rows, static_cast<Wide<T>*>(scratch));
  });
}

void backward(Dtype dtype, Backward a, Rows rows, void* scratch) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    backward<T>(a, rows, static_cast<Wide<T>*>(scratch));
  });
}

void double_backward(Dtype dtype, DoubleBackward a, Rows rows, void* scratch) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    auto* memory = static_cast<Wide<T>*>(scratch);
    if (a.v == nullptr && a.u == nullptr)
      double_backward<T, false, false>(a, rows, memory);
    else if (a.v == nullptr)
      double_backward<T, false, true>(a, rows, memory);
    else if (a.u == nullptr)
      double_backward<T, true, false>(a, rows, memory);
    else
      double_backward<T, true, true>(a, rows, memory);
  });
}

void widen(Dtype dtype, const void* in, void* wide, std::int64_t n) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (is_narrow<T>) {
      gn_kernels::widen(static_cast<const T*>(in), static_cast<float*>(wide), n);
    } else {
      std::memcpy(wide, in, std::size_t(n) * sizeof(T));
    }
  });
}

void narrow(Dtype dtype, const void* wide, void* out, std::int64_t n) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    if constexpr (is_narrow<T>) {
      gn_kernels::narrow(static_cast<const float*>(wide), static_cast<T*>(out), n);
    } else {
      std::memcpy(out, wide, std::size_t(n) * sizeof(T));
    }
  });
}

void add_up(Dtype dtype, const void* partials, void* sums, std::int64_t count, std::int64_t n,
            std::int64_t begin, std::int64_t end) {
  with_dtype(dtype, [&](auto element) {
    using R = Wide<decltype(element)>;
    const R* partial = static_cast<const R*>(partials);
    R* sum = static_cast<R*>(sums);
    for_row<R>(end - begin, [&](std::int64_t j, auto one) {
      using V = decltype(one);
      V total = {};
      for (std::int64_t k = 0; k < count; ++k) total += load<V>(partial + k * n + begin + j);
      store<V>(sum + begin + j, total);
    });
  });
}

}  // namespace

extern const Kernels GN_KERNELS_ISA;
const Kernels GN_KERNELS_ISA = {forward, backward, double_backward, widen, narrow, add_up};

}  // namespace gn_kernels::layer_norm
