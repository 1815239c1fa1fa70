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

}  // namespace

int main() {
  test_every_length();
  test_around_2_31();
  test_grid();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
