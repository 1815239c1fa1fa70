// Compiled several times, with GN_KERNELS_ISA naming the instruction set and the compiler's flags
// choosing it. Everything is local to this file or always inlined, so that no function compiled for
// one instruction set can stand in for its namesake of another.
#include "kernels.h"

#include <cstring>

#include "numbers.h"

#if defined(__clang__)
#define GN_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define GN_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace gn_kernels {
namespace {

template <class T>
struct PrecisionOf {
  using type = Half;
};
template <>
struct PrecisionOf<float> {
  using type = Single;
};
template <>
struct PrecisionOf<double> {
  using type = Double;
};
template <class T>
using Precision = typename PrecisionOf<T>::type;

// N elements; 16-bit types pass through buffers of floats.
template <class Op, int N, class T, class R>
GN_INLINE void map_block(const T* const (&in)[Op::in], T* const (&out)[Op::out]) {
  constexpr bool is_narrow = sizeof(T) == 2;
  R wide_in[Op::in][is_narrow ? N : 1], wide_out[Op::out][is_narrow ? N : 1];
  const R* from[Op::in];
  R* to[Op::out];
  if constexpr (is_narrow) {
    for (int k = 0; k < Op::in; ++k) widen(in[k], wide_in[k], N), from[k] = wide_in[k];
    for (int k = 0; k < Op::out; ++k) to[k] = wide_out[k];
  } else {
    for (int k = 0; k < Op::in; ++k) from[k] = in[k];
    for (int k = 0; k < Op::out; ++k) to[k] = out[k];
  }
  GN_INDEPENDENT
  for (int i = 0; i < N; ++i) {
    R arguments[Op::in], results[Op::out];
    for (int k = 0; k < Op::in; ++k) arguments[k] = from[k][i];
    Op::apply(arguments, results);
    for (int k = 0; k < Op::out; ++k) to[k][i] = results[k];
  }
  if constexpr (is_narrow) {
    for (int k = 0; k < Op::out; ++k) narrow(wide_out[k], out[k], N);
  }
}

// All n elements: whole blocks where they lie, the rest in small padded copies. Every element goes
// through the same vector code, whatever its place.
template <class Op, class T, class R>
void map(const T* const (&in)[Op::in], T* const (&out)[Op::out], std::int64_t n) {
  const T* from[Op::in];
  T* to[Op::out];
  std::int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    for (int k = 0; k < Op::in; ++k) from[k] = in[k] + i;
    for (int k = 0; k < Op::out; ++k) to[k] = out[k] + i;
    map_block<Op, kBlock, T, R>(from, to);
  }
  constexpr int small = 64;
  T copies_in[Op::in][small] = {}, copies_out[Op::out][small];
  for (int k = 0; k < Op::in; ++k) from[k] = copies_in[k];
  for (int k = 0; k < Op::out; ++k) to[k] = copies_out[k];
  for (; i < n; i += small) {
    const std::size_t bytes = sizeof(T) * std::size_t(n - i < small ? n - i : small);
    for (int k = 0; k < Op::in; ++k) std::memcpy(copies_in[k], in[k] + i, bytes);
    map_block<Op, small, T, R>(from, to);
    for (int k = 0; k < Op::out; ++k) std::memcpy(out[k] + i, copies_out[k], bytes);
  }
}

// Calls f(activation, element), objects that carry a type each, for a kind and a dtype.
template <class A, class F>
void with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::Float16: return f(A{}, float16{});
    case Dtype::BFloat16: return f(A{}, bfloat16{});
    case Dtype::Float32: return f(A{}, float{});
    case Dtype::Float64: return f(A{}, double{});
  }
}

template <class F>
void with_types(Kind kind, Dtype dtype, F f) {
  switch (kind) {
#define ROW(Activation, name) \
  case Kind::Activation: return with_dtype<Activation>(dtype, f);
    GN_KERNELS_ACTIVATIONS(ROW)
#undef ROW
  }
}

template <template <class, class> class Order, class A, class T, int I, int O>
void run(const void* const (&in)[I], void* const (&out)[O], std::int64_t n) {
  using P = Precision<T>;
  using R = typename P::real;
  const T* from[I];
  T* to[O];
  for (int k = 0; k < I; ++k) from[k] = static_cast<const T*>(in[k]);
  for (int k = 0; k < O; ++k) to[k] = static_cast<T*>(out[k]);
  map<Order<A, P>, T, R>(from, to, n);
}

void forward(Kind kind, Dtype dtype, const void* x, void* y, std::int64_t n) {
  with_types(kind, dtype, [&](auto activation, auto element) {
    run<Forward, decltype(activation), decltype(element)>({x}, {y}, n);
  });
}

void backward(Kind kind, Dtype dtype, const void* grad, const void* x, void* grad_x,
              std::int64_t n) {
  with_types(kind, dtype, [&](auto activation, auto element) {
    run<Backward, decltype(activation), decltype(element)>({grad, x}, {grad_x}, n);
  });
}

void double_backward(Kind kind, Dtype dtype, const void* v, const void* grad, const void* x,
                     void* grad_grad, void* grad_x, std::int64_t n) {
  with_types(kind, dtype, [&](auto activation, auto element) {
    using A = decltype(activation);
    using T = decltype(element);
    if (grad_grad == nullptr) {
      run<Curvature, A, T>({v, grad, x}, {grad_x}, n);
    } else {
      run<DoubleBackward, A, T>({v, grad, x}, {grad_grad, grad_x}, n);
    }
  });
}

}  // namespace

extern const Kernels GN_KERNELS_ISA;
const Kernels GN_KERNELS_ISA = {forward, backward, double_backward};

}  // namespace gn_kernels
