// Compiled several times, as kernels.cpp is, and local to this file for the same reason.
#include "layer_norm.h"

#include <cmath>
#include <cstring>

#include "../layer_norm.h"
#include "numbers.h"

// Lets the compiler reorder the sums named, and nothing else.
#define GN_SIMD _Pragma("omp simd")
#define GN_SIMD_SUM(...) GN_PRAGMA(omp simd reduction(+ : __VA_ARGS__))
#define GN_PRAGMA(text) _Pragma(#text)

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

template <class F>
GN_INLINE void for_chunks(std::int64_t n, F f) {
  for (std::int64_t begin = 0; begin < n; begin += kChunk) {
    f(begin, n < begin + kChunk ? n : begin + kChunk);
  }
}

// Sum of x[j] - offset over a row, and of its squares. Several sums run side by side, so that an
// addition does not wait for the one before.
template <class R>
struct Moments {
  R sum = 0, squares = 0;

  GN_INLINE Moments(const R* x, R offset, std::int64_t n) {
    for_chunks(n, [&](std::int64_t begin, std::int64_t end) {
      const std::int64_t half = (end - begin) / 32 * 16;  // of whole vectors
      R a = 0, b = 0, aa = 0, bb = 0;
      GN_SIMD_SUM(a, b, aa, bb)
      for (std::int64_t j = begin; j < begin + half; ++j) {
        const R left = x[j] - offset, right = x[j + half] - offset;
        a += left;
        b += right;
        aa += left * left;
        bb += right * right;
      }
      GN_SIMD_SUM(a, aa)
      for (std::int64_t j = begin + 2 * half; j < end; ++j) {
        const R left = x[j] - offset;
        a += left;
        aa += left * left;
      }
      sum += a + b;
      squares += aa + bb;
    });
  }
};

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
    const R about = x[0] + Moments<R>(x, x[0], n).sum / R(n);
    const Moments<R> moments(x, about, n);
    const R rest = moments.sum / R(n), mean = about + rest;
    const R variance = moments.squares / R(n) - rest * rest;
    const R r = 1 / std::sqrt((variance < 0 ? R(0) : variance) + R(a.eps));
    GN_SIMD
    for (std::int64_t j = 0; j < n; ++j) y[j] = (x[j] - mean) * r * w[j] + b[j];
    written<T>(y, a.y, i, n);
    static_cast<R*>(a.mean)[i] = mean;
    static_cast<R*>(a.rstd)[i] = r;
  }
}

template <class T, class R = Wide<T>>
void backward(const Backward& a, Rows rows, R* scratch) {
  const std::int64_t n = rows.length;
  const R* w = static_cast<const R*>(a.weight);
  R* sum_for_weight = static_cast<R*>(a.sum_for_weight);
  R* sum_for_bias = static_cast<R*>(a.sum_for_bias);
  R *x_buffer = scratch, *g_buffer = scratch + n, *x_hat = scratch + 2 * n;
  for (std::int64_t i = rows.begin; i < rows.end; ++i) {
    const R* g = read<T>(a.grad, i, n, g_buffer);
    if (sum_for_bias != nullptr) {
      GN_SIMD
      for (std::int64_t j = 0; j < n; ++j) sum_for_bias[j] += g[j];
    }
    if (a.for_x == nullptr && sum_for_weight == nullptr) continue;

    const R* x = read<T>(a.x, i, n, x_buffer);
    const R mean = static_cast<const R*>(a.mean)[i], r = static_cast<const R*>(a.rstd)[i];
    R h_sum = 0, hx_sum = 0;
    for_chunks(n, [&](std::int64_t begin, std::int64_t end) {
      R h_part = 0, hx_part = 0;
      GN_SIMD_SUM(h_part, hx_part)
      for (std::int64_t j = begin; j < end; ++j) {
        const R z = (x[j] - mean) * r, h = g[j] * w[j];
        x_hat[j] = z;
        h_part += h;
        hx_part += h * z;
      }
      h_sum += h_part;
      hx_sum += hx_part;
    });
    if (sum_for_weight != nullptr) {
      GN_SIMD
      for (std::int64_t j = 0; j < n; ++j) sum_for_weight[j] += g[j] * x_hat[j];
    }
    if (a.for_x != nullptr) {
      const Projection<R> projection{r, h_sum / R(n), hx_sum / R(n)};
      R* out = place<T>(a.for_x, i, n, x_buffer);
      GN_SIMD
      for (std::int64_t j = 0; j < n; ++j) out[j] = projection(g[j] * w[j], x_hat[j]);
      written<T>(out, a.for_x, i, n);
    }
  }
}

template <class T, bool HAS_V, bool HAS_U, class R = Wide<T>>
void double_backward(const DoubleBackward& a, Rows rows, R* scratch) {
  const std::int64_t n = rows.length;
  const R* w = static_cast<const R*>(a.weight);
  const R* u = static_cast<const R*>(a.u);
  const R* t = static_cast<const R*>(a.t);
  R* sum_for_weight = static_cast<R*>(a.sum_for_weight);
  R *x_buffer = scratch, *g_buffer = scratch + n, *v_buffer = scratch + 2 * n;
  R *x_hat = scratch + 3 * n, *r_pv = scratch + 4 * n, *result = scratch + 5 * n;
  for (std::int64_t i = rows.begin; i < rows.end; ++i) {
    const R* x = read<T>(a.x, i, n, x_buffer);
    const R* g = read<T>(a.grad, i, n, g_buffer);
    const R* v = HAS_V ? read<T>(a.v, i, n, v_buffer) : nullptr;
    const R mean = static_cast<const R*>(a.mean)[i], r = static_cast<const R*>(a.rstd)[i];

    R h_sum = 0, hx_sum = 0, v_sum = 0, vx_sum = 0, vh_sum = 0, k_sum = 0, kx_sum = 0;
    for_chunks(n, [&](std::int64_t begin, std::int64_t end) {
      R h_part = 0, hx_part = 0, v_part = 0, vx_part = 0, vh_part = 0, k_part = 0, kx_part = 0;
      GN_SIMD_SUM(h_part, hx_part, v_part, vx_part, vh_part, k_part, kx_part)
      for (std::int64_t j = begin; j < end; ++j) {
        const R z = (x[j] - mean) * r, h = g[j] * w[j];
        x_hat[j] = z;
        if constexpr (HAS_V) {
          h_part += h;
          hx_part += h * z;
          v_part += v[j];
          vx_part += v[j] * z;
          vh_part += v[j] * h;
        }
        if constexpr (HAS_U) {
          const R k = g[j] * u[j];
          k_part += k;
          kx_part += k * z;
        }
      }
      h_sum += h_part, hx_sum += hx_part;
      v_sum += v_part, vx_sum += vx_part, vh_sum += vh_part;
      k_sum += k_part, kx_sum += kx_part;
    });
    const Projection<R> of_v{r, v_sum / R(n), vx_sum / R(n)};
    const Projection<R> of_h{r, h_sum / R(n), hx_sum / R(n)};
    const Projection<R> of_k{r, k_sum / R(n), kx_sum / R(n)};
    const Curvature<R> curvature(of_v, of_h, vh_sum / R(n));

    if constexpr (HAS_V) {
      GN_SIMD
      for (std::int64_t j = 0; j < n; ++j) r_pv[j] = of_v(v[j], x_hat[j]);
    }
    if (a.for_grad != nullptr) {
      R* out = place<T>(a.for_grad, i, n, result);
      GN_SIMD
      for (std::int64_t j = 0; j < n; ++j) {
        R sum = t[j];
        if constexpr (HAS_V) sum += r_pv[j] * w[j];
        if constexpr (HAS_U) sum += x_hat[j] * u[j];
        out[j] = sum;
      }
      written<T>(out, a.for_grad, i, n);
    }
    if (a.for_x != nullptr) {
      R* out = place<T>(a.for_x, i, n, result);
      GN_SIMD
      for (std::int64_t j = 0; j < n; ++j) {
        R sum = 0;
        if constexpr (HAS_V) sum += curvature(r_pv[j], g[j] * w[j], x_hat[j]);
        if constexpr (HAS_U) sum += of_k(g[j] * u[j], x_hat[j]);
        out[j] = sum;
      }
      written<T>(out, a.for_x, i, n);
    }
    if constexpr (HAS_V) {
      if (sum_for_weight != nullptr) {
        GN_SIMD
        for (std::int64_t j = 0; j < n; ++j) sum_for_weight[j] += g[j] * r_pv[j];
      }
    }
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
    for (std::int64_t j = begin; j < end; ++j) sum[j] = 0;
    for (std::int64_t k = 0; k < count; ++k, partial += n) {
      GN_SIMD
      for (std::int64_t j = begin; j < end; ++j) sum[j] += partial[j];
    }
  });
}

}  // namespace

extern const Kernels GN_KERNELS_ISA;
const Kernels GN_KERNELS_ISA = {forward, backward, double_backward, widen, narrow, add_up};

}  // namespace gn_kernels::layer_norm
