// Which thread of the CUDA kernels handles which elements: every element once, nothing outside.
#include "../../csrc/cuda/indices.h"

#include <vector>

#include "check.h"

using namespace gn_kernels::cuda;

namespace {

// Walks over the blocks from `first` on as the kernels do, and counts how often each element of
// [origin, n) is handled. Elements before `origin` must not be.
std::vector<int> visits(std::int64_t n, int threads, int vectors, int lanes, bool is_aligned,
                        std::int64_t first, std::int64_t origin) {
  const int size = threads * vectors * lanes;
  const Blocks blocks = blocks_of(n, size, is_aligned);
  std::vector<int> count(static_cast<std::size_t>(n - origin));
  const auto visit = [&](std::int64_t element) {
    CHECK(element >= origin && element < n, "element %lld of %lld", static_cast<long long>(element),
          static_cast<long long>(n));
    if (element >= origin && element < n) ++count[static_cast<std::size_t>(element - origin)];
  };
  for (std::int64_t block = first; block < blocks.count; ++block) {
    const std::int64_t start = start_of_block(block, size);
    for (int thread = 0; thread < threads; ++thread) {
      if (block < blocks.whole) {
        for (int v = 0; v < vectors; ++v) {
          const std::int64_t at = start + start_of_vector(thread, v, threads, lanes);
          CHECK(at % lanes == 0, "a vector at %lld", static_cast<long long>(at));
          for (int lane = 0; lane < lanes; ++lane) visit(at + lane);
        }
      } else {
        const int length = length_of_block(block, size, n);
        CHECK(length > 0 && length <= size, "%d", length);
        for (int i = thread; i < length; i += threads) visit(start + i);
      }
    }
  }
  return count;
}

void check_once(const std::vector<int>& count, std::int64_t n, int lanes) {
  for (std::size_t i = 0; i < count.size(); ++i) {
    CHECK(count[i] == 1, "element %zu of %lld, %d lanes: %d times", i, static_cast<long long>(n),
          lanes, count[i]);
  }
}

void test_every_length() {
  for (std::int64_t n = 0; n <= 4096; ++n) {
    for (const int lanes : {2, 4, 8}) {
      for (const bool is_aligned : {false, true}) {
        check_once(visits(n, 128, 2, lanes, is_aligned, 0, 0), n, lanes);
        check_once(visits(n, 32, 1, lanes, is_aligned, 0, 0), n, lanes);
      }
    }
  }
}

// The last blocks of a tensor with about as many elements as a 32-bit number can count.
void test_around_2_31() {
  constexpr int threads = 128, vectors = 2;
  for (const std::int64_t near : {std::int64_t(1) << 31, std::int64_t(1) << 32}) {
    for (std::int64_t n = near - 70; n <= near + 70; ++n) {
      for (const int lanes : {2, 4, 8}) {
        for (const bool is_aligned : {false, true}) {
          const int size = threads * vectors * lanes;
          const Blocks blocks = blocks_of(n, size, is_aligned);
          const std::int64_t first = blocks.count - 2, origin = start_of_block(first, size);
          CHECK(origin > near - 3 * size - 70 && origin < n, "%lld",
                static_cast<long long>(origin));
          check_once(visits(n, threads, vectors, lanes, is_aligned, first, origin), n, lanes);
        }
      }
    }
  }
}

// A grid that is smaller than the number of blocks takes strides: together they are all blocks.
void test_grid() {
  for (const std::int64_t count :
       {std::int64_t(1), kMaxGrid - 1, kMaxGrid, kMaxGrid + 1, 3 * kMaxGrid + 5}) {
    const std::int64_t grid = grid_of(count);
    CHECK(grid >= 1 && grid <= count && grid <= kMaxGrid, "%lld", static_cast<long long>(grid));
    std::int64_t handled = 0;
    for (std::int64_t block = 0; block < grid; ++block) {
      for (std::int64_t at = block; at < count; at += grid) ++handled;
    }
    CHECK(handled == count, "%lld of %lld", static_cast<long long>(handled),
          static_cast<long long>(count));
  }
}

// Every column of a row of n elements once, in vectors and one by one, nothing outside of it; from
// chunk `first` on, if the row is too long for all.
void check_row(std::int64_t n, int elements, int lanes, bool is_aligned, int most_threads,
               std::int64_t from = 0) {
  const RowTiling t = tiling_of(n, elements, lanes, is_aligned, most_threads);
  const std::int64_t held = std::int64_t(t.threads) * elements;
  CHECK(t.n == n && t.threads % kWarp == 0 && t.threads >= kWarp && t.threads <= most_threads,
        "%d threads for %lld", t.threads, static_cast<long long>(n));
  CHECK(held * t.chunks >= n && held * (t.chunks - 1) < n, "%d chunks of %lld for %lld", t.chunks,
        static_cast<long long>(held), static_cast<long long>(n));
  CHECK(t.threads == most_threads || held - kWarp * elements < n, "%d threads for %lld", t.threads,
        static_cast<long long>(n));
  CHECK(t.vectors == (is_aligned && n % lanes == 0), "vectors of %lld", static_cast<long long>(n));
  CHECK(t.together * t.threads <= most_threads || t.threads == kWarp, "%d rows", t.together);
  const int first = int(from / held);
  const std::int64_t origin = first * held;
  std::vector<int> count(static_cast<std::size_t>(n - origin));
  for (int chunk = first; chunk < t.chunks; ++chunk) {
    for (int thread = 0; thread < t.threads; ++thread) {
      const int pieces = t.vectors ? elements / lanes : elements, width = t.vectors ? lanes : 1;
      for (int piece = 0; piece < pieces; ++piece) {
        const int column = t.vectors ? column_of_vector(t, chunk, thread, piece, elements, lanes)
                                     : column_of_element(t, chunk, thread, piece, elements);
        CHECK(column >= origin && column % width == 0, "column %d of %lld", column,
              static_cast<long long>(n));
        if (column >= n || column < origin) continue;
        for (int lane = 0; lane < width; ++lane) {
          CHECK(column + lane < n, "column %d of %lld", column + lane, static_cast<long long>(n));
          if (column + lane < n) ++count[static_cast<std::size_t>(column - origin + lane)];
        }
      }
    }
  }
  check_once(count, n, lanes);
}

struct Holding {
  int elements, lanes, most_threads;
};
// LayerNorm's and softmax's of 2, 4 and 8 bytes.
constexpr Holding kHoldings[] = {{8, 8, 512}, {8, 4, 512}, {8, 2, 256},
                                 {8, 8, 256}, {8, 4, 256}, {4, 2, 256}};

void test_every_row_length() {
  for (std::int64_t n = 1; n <= 4200; ++n) {
    for (const Holding& one : kHoldings) {
      for (const bool is_aligned : {false, true}) {
        check_row(n, one.elements, one.lanes, is_aligned, one.most_threads);
      }
    }
  }
}

// The ends of the longest rows: columns are 32-bit numbers.
void test_rows_of_2_30() {
  const std::int64_t most = (std::int64_t(1) << 30) - 1;
  for (const std::int64_t n : {most, most - 1, most - 3, most - 7, most - 4095, most - 4100}) {
    for (const Holding& one : kHoldings) {
      for (const bool is_aligned : {false, true}) {
        check_row(n, one.elements, one.lanes, is_aligned, one.most_threads, n - 5000);
      }
    }
  }
}

// The threads of a grid take every row once; near the end of a tensor with about as many elements
// as a 32-bit number counts, and of one with as many rows.
void test_rows_of_a_grid() {
  const std::int64_t edge = std::int64_t(1) << 31;
  for (const std::int64_t n : {1, 49, 197, 768, 4100, (1 << 30) - 1}) {
    const RowTiling t = tiling_of(n, 8, 8, true);
    for (const std::int64_t elements : {edge, 2 * edge, edge * n, 2 * edge * n}) {
      for (int difference = -9; difference <= 9; ++difference) {
        const std::int64_t rows = elements / n + difference;
        if (rows < 10 || rows > 2 * edge) continue;
        const std::int64_t groups = row_groups(t, rows);
        CHECK((groups - 1) * t.together < rows && groups * t.together >= rows, "%lld groups",
              static_cast<long long>(groups));
        // A block for each group, as if a grid could be as large: the last rows of the tensor.
        std::vector<int> count(static_cast<std::size_t>(9));
        for (std::int64_t block = groups - 5 > 0 ? groups - 5 : 0; block < groups; ++block) {
          for (int place = 0; place < t.together; ++place) {
            const std::int64_t row = first_row(t, unsigned(block % kMaxGrid), unsigned(place)) +
                                     block / kMaxGrid * rows_of_grid(t, unsigned(kMaxGrid));
            CHECK(row == block * t.together + place, "row %lld", static_cast<long long>(row));
            if (row < rows && row >= rows - 5) ++count[static_cast<std::size_t>(rows - 1 - row)];
            const std::int64_t start = start_of_row(t, row);
            CHECK(start / n == row && start % n == 0 && start >= 0, "row %lld starts at %lld",
                  static_cast<long long>(row), static_cast<long long>(start));
          }
        }
        for (int k = 0; k < 5; ++k) CHECK(count[std::size_t(k)] == 1, "row %d from the end", k);
      }
    }
  }
}

// Threads of a part of a warp have every column of a row once, in vectors of which the first half
// is whole; rows that are not in vectors, or that have another number of columns, have no such
// part.
void test_parts_of_warps() {
  struct {
    int of_part, elements, lanes;
  } const holdings[] = {{16, 8, 8}, {16, 8, 4}, {8, 4, 2}};  // of 2, 4 and 8 bytes
  for (std::int64_t n = 1; n <= 700; ++n) {
    for (const auto& [of_part, elements, lanes] : holdings) {
      for (const std::int64_t pitch : {n, (n + lanes - 1) / lanes * lanes, n + 3}) {
        for (const bool is_aligned : {false, true}) {
          const bool vectors = is_aligned && pitch % lanes == 0;
          const int part = part_of_warp(n, of_part, lanes, pitch, is_aligned);
          const RowTiling t = tiling_of_scores(n, part, elements, lanes, pitch, is_aligned, 256);
          CHECK(t.vectors == vectors && t.n == n, "vectors of %d", int(n));
          CHECK((part > 0) == (vectors && n > 2 * of_part && n <= kWarp * of_part),
                "a part of %d for %d", part, int(n));
          if (part == 0) {
            CHECK(t.threads >= kWarp, "%d threads for %d", t.threads, int(n));
            continue;
          }
          CHECK(t.threads == part && t.threads * t.together == kThreadsOfParts && t.chunks == 1,
                "%d threads of %d for %d", t.threads, t.together, int(n));
          std::vector<int> count(static_cast<std::size_t>(n));
          for (int thread = 0; thread < part; ++thread) {
            for (int v = 0; v < of_part / lanes; ++v) {
              const int column = start_of_vector(thread, v, part, lanes);
              CHECK(v >= of_part / lanes / 2 || column + lanes <= n, "vector %d of %d", v, int(n));
              CHECK(column >= n || column + lanes <= pitch, "vector %d of %d", v, int(n));
              for (int lane = 0; lane < lanes && column + lane < n; ++lane) {
                ++count[static_cast<std::size_t>(column + lane)];
              }
            }
          }
          check_once(count, n, lanes);
        }
      }
    }
  }
}

// The elements of a vector that are masked, byte by byte.
void test_bits_of_lanes() {
  for (const int size : {2, 4, 8}) {
    for (int lanes = 0; lanes <= kVectorBytes / size; ++lanes) {
      for (int byte = 0; byte < kVectorBytes; ++byte) {
        const std::uint32_t bits = bits_of_lanes(lanes, byte / 4, size) >> 8 * (byte % 4) & 0xff;
        CHECK(bits == (byte < lanes * size ? 0xffu : 0u), "%d lanes of %d, byte %d", lanes, size,
              byte);
      }
    }
  }
}

// Rows with a distance between them, up to the last ones: near the end of a tensor with about as
// many elements as a 32-bit number counts, and of one with as many rows.
void test_start_of_scores() {
  const std::int64_t edge = std::int64_t(1) << 31;
  for (const std::int64_t pitch : {std::int64_t(1), std::int64_t(56), std::int64_t(200),
                                   std::int64_t(4104), edge - 8, edge - 1}) {
    for (const std::int64_t near : {edge / pitch, 2 * edge / pitch, edge, kMaxScoreRows}) {
      for (std::int64_t row = near - 9; row < near + 9; ++row) {
        if (row < 0 || row >= kMaxScoreRows + kThreadsOfParts) continue;
        const std::int64_t start = start_of_scores(std::uint32_t(row), std::uint32_t(pitch));
        CHECK(start == row * pitch && start / pitch == row, "row %lld starts at %lld",
              static_cast<long long>(row), static_cast<long long>(start));
      }
    }
  }
}

void test_dividers() {
  const std::int64_t end = std::int64_t(1) << 32;
  for (const std::int64_t near :
       {std::int64_t(1), std::int64_t(49), std::int64_t(197), std::int64_t(65536), end / 2, end}) {
    for (std::int64_t divisor = near - 70; divisor <= near + 70; ++divisor) {
      if (divisor < 1 || divisor >= end) continue;
      const Divider by(divisor);
      const auto check = [&](std::int64_t x) {
        if (x < 0 || x >= end) return;
        auto whole = std::uint32_t(x);
        const std::int64_t rest = by.split(whole);
        CHECK(whole == x / divisor && rest == x % divisor, "%lld by %lld",
              static_cast<long long>(x), static_cast<long long>(divisor));
      };
      for (std::int64_t x = 0; x < 300; ++x) check(x), check(end / 2 - x), check(end - 1 - x);
      for (std::int64_t k = 1; k <= 300; ++k) {  // beside multiples all over the range
        const std::int64_t multiple = (end / divisor) * k / 300 * divisor;
        for (std::int64_t x = multiple - 2; x <= multiple + 2; ++x) check(x);
      }
    }
  }
}

// Up to the last of 2^32 rows.
void test_rows_of_scores() {
  const std::int64_t end = std::int64_t(1) << 32;
  for (const std::int64_t n : {1, 49, 197, 65536}) {
    for (const std::int64_t heads : {1, 3, 12}) {
      for (const std::int64_t period : {std::int64_t(1), std::int64_t(64), end - 1}) {
        const Scores scores{0, 0, {}, Divider(n), Divider(heads), Divider(period)};
        for (const std::int64_t from : {std::int64_t(0), end / 2 - 300, end - 300}) {
          for (std::int64_t row = from; row < from + 300; ++row) {
            const ScoreRow at = scores.at(std::uint32_t(row));
            CHECK(at.query == row % n && at.head == row / n % heads &&
                      at.element == row / n / heads % period,
                  "row %lld", static_cast<long long>(row));
          }
        }
      }
    }
  }
}

}  // namespace

int main() {
  test_every_length();
  test_around_2_31();
  test_grid();
  test_every_row_length();
  test_rows_of_2_30();
  test_rows_of_a_grid();
  test_parts_of_warps();
  test_bits_of_lanes();
  test_start_of_scores();
  test_dividers();
  test_rows_of_scores();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
