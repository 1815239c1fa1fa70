// Which thread handles which elements, for host and device: no memory is touched here.
//
// Offsets into a tensor are 64-bit. Those inside a block are 32-bit: a block is small.
#pragma once

#include <cstdint>

#include "../activations.h"

namespace gn_kernels::cuda {

constexpr int kVectorBytes = 16;  // the widest access that a thread can make

// --- n elements in blocks of `size`, for the kernels that treat each element by itself
// ------------

// More programs than this one after the other: 16 times what 132 multiprocessors hold at once, so
// that a last wave which fills them in part is at most a sixteenth of the time.
constexpr std::int64_t kMaxGrid = 16 * 132 * 16;

struct Blocks {
  std::int64_t count;  // with the last one, which may be shorter
  std::int64_t whole;  // the first ones, which a thread reads and writes in vectors
};

// Vectors need memory that is aligned to their size: else no block counts as whole.
GN_INLINE Blocks blocks_of(std::int64_t n, int size, bool is_aligned) {
  return {n / size + (n % size != 0), is_aligned ? n / size : 0};
}

GN_INLINE unsigned grid_of(std::int64_t blocks) {
  return unsigned(blocks < kMaxGrid ? blocks : kMaxGrid);
}

GN_INLINE std::int64_t start_of_block(std::int64_t block, int size) { return block * size; }

// How many elements the block has.
GN_INLINE int length_of_block(std::int64_t block, int size, std::int64_t n) {
  const std::int64_t rest = n - start_of_block(block, size);
  return rest < size ? int(rest) : size;
}

// Where in a whole block a thread's vector of `lanes` elements begins: neighbouring threads read
// neighbouring vectors.
GN_INLINE int start_of_vector(int thread, int vector, int threads, int lanes) {
  return (vector * threads + thread) * lanes;
}

}  // namespace gn_kernels::cuda
