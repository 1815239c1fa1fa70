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

// --- Rows of n elements, for the kernels that sum over them
// ---------------------------------------

// Of each tensor a thread holds as many elements of a row at a time. A row that is longer than all
// its threads hold takes several turns, called chunks.
constexpr int kMaxRowThreads = 512;  // at most: which leaves each 128 registers
constexpr int kWarp = 32;
constexpr int kRowsOfWarps = 4;  // that a block takes at a time where a warp suffices for a row

struct RowTiling {
  int n;         // elements of a row; below 2^30
  int threads;   // that share a row: whole warps
  int together;  // rows that a block of threads handles at a time
  int chunks;
  bool vectors;  // whether rows are read in vectors of `lanes` elements
};

GN_INLINE RowTiling tiling_of(std::int64_t n, int elements, int lanes, bool is_aligned,
                              int most_threads = kMaxRowThreads) {
  const std::int64_t warps = (n + elements * kWarp - 1) / (elements * kWarp);
  const int threads = warps * kWarp < most_threads ? int(warps) * kWarp : most_threads;
  const std::int64_t held = std::int64_t(threads) * elements;
  return {int(n), threads, threads == kWarp ? kRowsOfWarps : 1, int((n + held - 1) / held),
          is_aligned && n % lanes == 0};
}

// The column at which a thread's vector begins; it has `lanes` columns, or none if that is not
// below n. A warp's columns are neighbours, and a thread's vectors as far apart as its warp is
// wide: a constant, so that an address serves all of them.
GN_INLINE int column_of_vector(const RowTiling& t, int chunk, int thread, int vector, int elements,
                               int lanes) {
  const auto lane = int(unsigned(thread) % kWarp);
  return (chunk * t.threads + thread - lane) * elements +
         start_of_vector(lane, vector, kWarp, lanes);
}

// The column of a thread's element where rows are read element by element: neighbouring threads
// read neighbouring elements. None if that is not below n.
GN_INLINE int column_of_element(const RowTiling& t, int chunk, int thread, int element,
                                int elements) {
  return chunk * t.threads * elements + start_of_vector(thread, element, t.threads, 1);
}

GN_INLINE std::int64_t row_groups(const RowTiling& t, std::int64_t rows) {
  return rows / t.together + (rows % t.together != 0);
}

// The row that a thread with `place` along y begins with; the next one is rows_of_grid further.
GN_INLINE std::int64_t first_row(const RowTiling& t, unsigned block, unsigned place) {
  return std::int64_t(block) * t.together + place;
}

GN_INLINE std::int64_t rows_of_grid(const RowTiling& t, unsigned grid) {
  return std::int64_t(grid) * t.together;
}

GN_INLINE std::int64_t start_of_row(const RowTiling& t, std::int64_t row) { return row * t.n; }

// Where a row of (batch, heads, n) is in (period, heads, n); there are fewer than 2^32 rows.
struct ScoreRow {
  std::uint32_t element, head, query;
};

GN_INLINE ScoreRow score_row(std::int64_t row, std::int64_t n, std::int64_t heads,
                             std::int64_t period) {
  const auto at = std::uint32_t(row), count = std::uint32_t(heads);
  const std::uint32_t head = at / std::uint32_t(n);
  return {head / count % std::uint32_t(period), head % count, at % std::uint32_t(n)};
}

}  // namespace gn_kernels::cuda
