// CUDA's language and the few functions of its runtime that csrc/cuda uses, for a C++ compiler: the
// kernels themselves run on the CPU, one block after the other, its threads as fibers that meet at
// barriers and shuffles. Included in front of the .cu files by the build.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct alignas(16) double2 {
  double x, y;
};

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

template <class Vector>
Vector __ldg(const Vector* from) {
  return *from;
}
template <class Vector>
void __stwb(Vector* to, Vector value) {
  *to = value;
}

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = 3, cudaSuccess;
}

namespace cuda_on_host {

struct Fiber {
  ucontext_t context;
  dim3 index;
  bool done;
};

struct Barrier {
  int arrived = 0;
  long generation = 0;
};

struct Block {
  static constexpr std::size_t stack_bytes = std::size_t(1) << 16;
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  Barrier all;
  std::vector<double> exchanged;  // what each thread shows to its warp
  ucontext_t scheduler;
  std::size_t current;
  bool moved;  // since the scheduler last looked
};

inline Block block;
inline std::unique_ptr<char[]> stacks;

inline void yield() { swapcontext(&block.fibers[block.current].context, &block.scheduler); }

inline void wait(Barrier& barrier, int threads) {
  block.moved = true;
  const long generation = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}

template <class... P, std::size_t... I>
void call(void (*kernel)(P...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<P*>(arguments[I])...);
}

template <class... P>
struct Launch {
  static inline void (*kernel)(P...);
  static inline void** arguments;

  static void enter() {
    call(kernel, arguments, std::index_sequence_for<P...>());
    block.fibers[block.current].done = true;
    block.moved = true;
    yield();
  }
};

template <class... P>
void run_block(dim3 shape) {
  const std::size_t threads = std::size_t(shape.x) * shape.y;
  constexpr std::size_t most = 1024;
  if (!stacks) stacks.reset(new char[most * Block::stack_bytes]);
  block = Block();
  block.fibers.resize(threads);
  block.warps.resize((threads + 31) / 32);
  block.exchanged.resize(threads);
  for (std::size_t i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.index = dim3(unsigned(i) % shape.x, unsigned(i) / shape.x);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks.get() + i * Block::stack_bytes;
    fiber.context.uc_stack.ss_size = Block::stack_bytes;
    makecontext(&fiber.context, &Launch<P...>::enter, 0);
  }
  for (;;) {
    std::size_t running = 0;
    block.moved = false;
    for (std::size_t i = 0; i < threads; ++i) {
      if (block.fibers[i].done) continue;
      ++running;
      block.current = i;
      threadIdx = block.fibers[i].index;
      swapcontext(&block.scheduler, &block.fibers[i].context);
    }
    if (running == 0) return;
    if (!block.moved) {
      std::printf("%zu threads wait for others that have ended\n", running);
      std::abort();
    }
  }
}

inline std::size_t thread() { return std::size_t(threadIdx.y) * blockDim.x + threadIdx.x; }

// What thread `other` of the warp shows.
template <class R>
R exchange(R value, std::size_t other) {
  const std::size_t me = thread();
  block.exchanged[me] = double(value);  // no number of R is lost
  wait(block.warps[me / 32], 32);
  const R shown = R(block.exchanged[other]);
  wait(block.warps[me / 32], 32);
  return shown;
}

}  // namespace cuda_on_host

inline void __syncthreads() {
  cuda_on_host::wait(cuda_on_host::block.all, int(blockDim.x * blockDim.y));
}

template <class R>
R __shfl_xor_sync(unsigned, R value, int distance) {
  return cuda_on_host::exchange(value, cuda_on_host::thread() ^ std::size_t(distance));
}

template <class R>
R __shfl_sync(unsigned, R value, int source) {
  return cuda_on_host::exchange(value, cuda_on_host::thread() / 32 * 32 + std::size_t(source));
}

template <class... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 shape, void** arguments,
                             std::size_t, cudaStream_t) {
  using Here = cuda_on_host::Launch<P...>;
  Here::kernel = kernel;
  Here::arguments = arguments;
  blockDim = shape;
  gridDim = grid;
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      cuda_on_host::run_block<P...>(shape);
    }
  }
  Here::arguments = nullptr;
  return cudaSuccess;
}
