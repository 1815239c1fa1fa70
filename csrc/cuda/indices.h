// Which thread handles which elements, for host and device: no memory is touched here.
//
// Offsets into a tensor are 64-bit. Those inside a block are 32-bit: a block is small.
#pragma once

#include <cstdint>

#include "../activations.h"

namespace gn_kernels::cuda {

constexpr int kVectorBytes = 16;  // the widest access that a thread can make

// --- n elements in blocks of `size`, for the kernels that treat each element by itself

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

// --- Rows of scores, for softmax

// Rows that threads of one warp can hold share it with others: of four threads or more, as few as
// hold a row. Then a row has more than half of what they hold, so that the first half of each
// thread's vectors is whole.
constexpr int kLeastPart = 4;
constexpr int kThreadsOfParts = 128;  // of a block of such rows

// So that a block's rows have numbers of 32 bits, also those that are not there.
constexpr std::int64_t kMaxScoreRows = (std::int64_t(1) << 32) - kThreadsOfParts;

// Rows begin `pitch` elements after each other, and are read in vectors where each begins at one.
GN_INLINE bool in_vectors(std::int64_t pitch, int lanes, bool is_aligned) {
  return is_aligned && pitch % lanes == 0;
}

// How many threads have a row of n scores, if it is in vectors; 0 if not a part of a warp.
GN_INLINE int part_of_warp(std::int64_t n, int elements, int lanes, std::int64_t pitch,
                           bool is_aligned) {
  int part = kLeastPart;
  while (part < kWarp && part * elements < n) part *= 2;
  const bool holds = n <= part * elements && 2 * n > part * elements;
  return holds && in_vectors(pitch, lanes, is_aligned) ? part : 0;
}

GN_INLINE RowTiling tiling_of_scores(std::int64_t n, int part, int elements, int lanes,
                                     std::int64_t pitch, bool is_aligned, int most_threads) {
  RowTiling t = tiling_of(n, elements, lanes, is_aligned, most_threads);
  t.vectors = in_vectors(pitch, lanes, is_aligned);
  if (part > 0) t.threads = part, t.together = kThreadsOfParts / part, t.chunks = 1;
  return t;
}

GN_INLINE std::int64_t start_of_scores(std::uint32_t row, std::uint32_t pitch) {
  return std::int64_t(std::uint64_t(row) * pitch);
}

// The bits of 32-bit word `word` of a vector that belong to its first `lanes` elements.
GN_INLINE std::uint32_t bits_of_lanes(int lanes, int word, int size) {
  const int bytes = lanes * size - 4 * word;
  return bytes >= 4 ? ~0u : bytes <= 0 ? 0u : (1u << 8 * bytes) - 1;
}

// Divides by a number that is known at launch. Source: Granlund and Montgomery, Division by
// invariant integers using multiplication, 1994, figure 4.1.
struct Divider {
  std::uint32_t divisor, factor;
  int first, second;  // shifts

  Divider() = default;
  explicit Divider(std::int64_t by) : divisor(std::uint32_t(by)) {
    int log = 0;
    while (log < 32 && std::uint64_t(1) << log < divisor) ++log;
    const std::uint64_t beyond = (std::uint64_t(1) << log) - divisor;
    factor = std::uint32_t((beyond << 32) / divisor + 1);
    first = log < 1 ? log : 1;
    second = log - first;
  }

  GN_INLINE std::uint32_t quotient(std::uint32_t x) const {
    const auto high = std::uint32_t(std::uint64_t(x) * factor >> 32);
    return (high + ((x - high) >> first)) >> second;
  }

  // The remainder; x becomes the quotient.
  GN_INLINE std::uint32_t split(std::uint32_t& x) const {
    const std::uint32_t whole = quotient(x), rest = x - whole * divisor;
    x = whole;
    return rest;
  }
};

// Where a row of (batch, heads, n) is in (period, heads, n); there are fewer than 2^32 rows.
struct ScoreRow {
  std::uint32_t element, head, query;
};

// Scores as their kernels see them.
struct Scores {
  std::uint32_t rows, pitch;
  std::uint32_t last[4];  // bits_of_lanes of a vector in which the row ends
  Divider n, heads, period;

  GN_INLINE ScoreRow at(std::uint32_t row) const {
    ScoreRow found;
    found.query = n.split(row);
    found.head = heads.split(row);
    found.element = period.split(row);
    return found;
  }
};

}  // namespace gn_kernels::cuda
