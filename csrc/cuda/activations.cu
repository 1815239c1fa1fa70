// The activations: one kernel for each kind, order and dtype.
#include "memory.cuh"
#include "pair.cuh"

namespace gn_kernels::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kVectors = 2;  // of each tensor that a thread handles at a time

template <class T>
constexpr int kBlock = kThreads * kVectors * kLanes<T>;

template <class Op, class T>
struct Tensors {
  const T* in[Op::in];
  T* out[Op::out];
};

template <class Op, class R, int N>
__device__ __forceinline__ void apply(const R (&in)[Op::in][N], R (&out)[Op::out][N]) {
  using C = Computed<R>;
  constexpr int step = sizeof(C) / sizeof(R);
#pragma unroll
  for (int i = 0; i < N; i += step) {
    C arguments[Op::in], results[Op::out];
#pragma unroll
    for (int k = 0; k < Op::in; ++k) __builtin_memcpy(&arguments[k], &in[k][i], sizeof(C));
    Op::apply(arguments, results);
#pragma unroll
    for (int k = 0; k < Op::out; ++k) __builtin_memcpy(&out[k][i], &results[k], sizeof(C));
  }
}

template <class Op, class T>
__device__ __forceinline__ void whole_block(const Tensors<Op, T>& tensors, std::int64_t start) {
  using R = Wide<T>;
  constexpr int lanes = kLanes<T>;
  const std::int64_t first = start + start_of_vector(int(threadIdx.x), 0, kThreads, lanes);
  R in[Op::in][kVectors * lanes], out[Op::out][kVectors * lanes];
#pragma unroll
  for (int k = 0; k < Op::in; ++k) {
    const T* from = tensors.in[k] + first;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      load_vector(from + start_of_vector(0, v, kThreads, lanes), in[k] + v * lanes);
    }
  }
  apply<Op>(in, out);
#pragma unroll
  for (int k = 0; k < Op::out; ++k) {
    T* to = tensors.out[k] + first;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      store_vector(out[k] + v * lanes, to + start_of_vector(0, v, kThreads, lanes));
    }
  }
}

template <class Op, class T>
__device__ __forceinline__ void any_block(const Tensors<Op, T>& tensors, std::int64_t start,
                                          int length) {
  using R = Wide<T>;
#pragma unroll 1
  for (int i = int(threadIdx.x); i < length; i += kThreads) {
    R arguments[Op::in], results[Op::out];
#pragma unroll
    for (int k = 0; k < Op::in; ++k) arguments[k] = widen(tensors.in[k][start + i]);
    Op::apply(arguments, results);
#pragma unroll
    for (int k = 0; k < Op::out; ++k) narrow(results[k], tensors.out[k][start + i]);
  }
}

template <class Op, class T>
__global__ void __launch_bounds__(kThreads)
    activation(Tensors<Op, T> tensors, std::int64_t n, Blocks blocks) {
  constexpr int size = kBlock<T>;
  for (std::int64_t block = blockIdx.x; block < blocks.count; block += gridDim.x) {
    const std::int64_t start = start_of_block(block, size);
    if (block < blocks.whole) {
      whole_block<Op, T>(tensors, start);
    } else {
      any_block<Op, T>(tensors, start, length_of_block(block, size, n));
    }
  }
}

template <class Op, class T, int I, int O>
Error run(const void* const (&in)[I], void* const (&out)[O], std::int64_t n, Stream stream) {
  Tensors<Op, T> tensors;
  bool aligned = true;
  for (int k = 0; k < I; ++k) {
    tensors.in[k] = static_cast<const T*>(in[k]);
    aligned = aligned && is_aligned(in[k]);
  }
  for (int k = 0; k < O; ++k) {
    tensors.out[k] = static_cast<T*>(out[k]);
    aligned = aligned && is_aligned(out[k]);
  }
  if (n == 0) return nullptr;
  const Blocks blocks = blocks_of(n, kBlock<T>, aligned);
  return launch(activation<Op, T>, grid_of(blocks.count), kThreads, stream, tensors, n, blocks);
}

// Calls f(activation, element), objects that carry a type each, for a kind and a dtype.
template <class F>
Error with_types(Kind kind, Dtype dtype, F f) {
  return with_dtype(dtype, [&](auto element) -> Error {
    switch (kind) {
#define ROW(Activation, name) \
  case Kind::Activation: return f(Activation{}, element);
      GN_KERNELS_ACTIVATIONS(ROW)
#undef ROW
    }
    return "no such kind";
  });
}

template <template <class, class> class Order, class A, class T>
using Op = Order<A, Precision<T>>;

}  // namespace

Error activation_forward(Kind kind, Dtype dtype, const void* x, void* y, std::int64_t n,
                         Stream stream) {
  return with_types(kind, dtype, [&](auto activation, auto element) {
    using T = decltype(element);
    return run<Op<Forward, decltype(activation), T>, T>({x}, {y}, n, stream);
  });
}

Error activation_backward(Kind kind, Dtype dtype, const void* grad, const void* x, void* grad_x,
                          std::int64_t n, Stream stream) {
  return with_types(kind, dtype, [&](auto activation, auto element) {
    using T = decltype(element);
    return run<Op<Backward, decltype(activation), T>, T>({grad, x}, {grad_x}, n, stream);
  });
}

Error activation_double_backward(Kind kind, Dtype dtype, const void* v, const void* grad,
                                 const void* x, void* grad_grad, void* grad_x, std::int64_t n,
                                 Stream stream) {
  return with_types(kind, dtype, [&](auto activation, auto element) {
    using A = decltype(activation);
    using T = decltype(element);
    if (grad_grad == nullptr) {
      return run<Op<Curvature, A, T>, T>({v, grad, x}, {grad_x}, n, stream);
    }
    return run<Op<DoubleBackward, A, T>, T>({v, grad, x}, {grad_grad, grad_x}, n, stream);
  });
}

}  // namespace gn_kernels::cuda
