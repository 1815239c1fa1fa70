// Compiled several times, like kernels.cpp, with everything local to this file.
#include "attention.h"

#include <cmath>
#include <limits>

#include "numbers.h"
#include "vectors.h"

namespace gn_kernels::attention {
namespace {

constexpr int kRows = kVectorBytes == 64 ? 12 : 6;  // what the registers hold

// A matrix product goes by tiles of kRows rows and two vectors, which the registers hold. Matrices
// that it multiplies from the right are packed into panels of that width: [panel][row][column].
template <class R>
struct Width {
  using vector = Vector<R>;
  static constexpr int lanes = kLanes<R>, columns = 2 * lanes;
};

template <class R>
constexpr std::int64_t padded(std::int64_t size) {
  constexpr int columns = Width<R>::columns;
  return (size + columns - 1) / columns * columns;
}

// c (rows, two vectors) = or += a b, where a(i, l) is a[i row + l column].
template <class R, int rows>
void tile(std::int64_t inner, const R* a, std::int64_t row, std::int64_t column, const R* b, R* c,
          std::int64_t c_row, bool add) {
  using vector = typename Width<R>::vector;
  constexpr int lanes = Width<R>::lanes;
  vector sums[rows][2];
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < 2; ++j) {
      sums[i][j] = add ? *reinterpret_cast<const vector*>(c + i * c_row + j * lanes) : vector{};
    }
  }
  for (std::int64_t l = 0; l < inner; ++l) {
    const vector b0 = *reinterpret_cast<const vector*>(b);
    const vector b1 = *reinterpret_cast<const vector*>(b + lanes);
    for (int i = 0; i < rows; ++i) {
      const vector spread = a[i * row] - vector{};
      sums[i][0] += spread * b0;
      sums[i][1] += spread * b1;
    }
    a += column;
    b += 2 * lanes;
  }
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < 2; ++j) {
      *reinterpret_cast<vector*>(c + i * c_row + j * lanes) = sums[i][j];
    }
  }
}

template <class R, int rows>
void last_tile(std::int64_t count, std::int64_t inner, const R* a, std::int64_t row,
               std::int64_t column, const R* b, R* c, std::int64_t c_row, bool add) {
  if (count == rows) return tile<R, rows>(inner, a, row, column, b, c, c_row, add);
  if constexpr (rows > 1) last_tile<R, rows - 1>(count, inner, a, row, column, b, c, c_row, add);
}

// A matrix in row-major order, or the transpose of one.
template <class R>
struct Left {
  const R* data;
  std::int64_t row, column;
};

// c (rows, columns rounded up to panels) = or += a b; b is packed.
template <class R>
void multiply(std::int64_t rows, std::int64_t inner, std::int64_t columns, Left<R> a, const R* b,
              R* c, std::int64_t c_row, bool add) {
  constexpr int width = Width<R>::columns;
  for (std::int64_t j = 0; j < columns; j += width) {
    const R* panel = b + j * inner;
    std::int64_t i = 0;
    for (; i + kRows <= rows; i += kRows) {
      tile<R, kRows>(inner, a.data + i * a.row, a.row, a.column, panel, c + i * c_row + j, c_row,
                     add);
    }
    if (i < rows) {
      last_tile<R, kRows - 1>(rows - i, inner, a.data + i * a.row, a.row, a.column, panel,
                              c + i * c_row + j, c_row, add);
    }
  }
}

GN_INLINE float widen(float x) { return x; }
GN_INLINE double widen(double x) { return x; }
GN_INLINE void narrow(float x, float& out) { out = x; }
GN_INLINE void narrow(double x, double& out) { out = x; }

template <class T>
const T* head_of(const Rows& rows, std::int64_t b, std::int64_t h) {
  return static_cast<const T*>(rows.data) + b * rows.batch + h * rows.head;
}

// Rows first to first + count of a head, packed for products over the rows (inner = count) ...
template <class T, class R>
void pack_rows(const Rows& from, std::int64_t b, std::int64_t h, std::int64_t first,
               std::int64_t count, std::int64_t size, R* to) {
  constexpr int width = Width<R>::columns;
  const T* data = head_of<T>(from, b, h) + first * from.row;
  for (std::int64_t j = 0; j < size; j += width) {
    const std::int64_t here = size - j < width ? size - j : width;
    for (std::int64_t i = 0; i < count; ++i, to += width) {
      const T* row = data + i * from.row + j;
      if (here == width) {
        for (int l = 0; l < width; ++l) to[l] = widen(row[l]);
      } else {
        for (int l = 0; l < width; ++l) to[l] = l < here ? widen(row[l]) : R(0);
      }
    }
  }
}

// ... packed for products over the columns (inner = size), the rows being the columns of panels ...
template <class T, class R>
void pack_columns(const Rows& from, std::int64_t b, std::int64_t h, std::int64_t count,
                  std::int64_t size, R* to) {
  constexpr int width = Width<R>::columns;
  const T* data = head_of<T>(from, b, h);
  for (std::int64_t i = 0; i < count; i += width, to += width * size) {
    for (int l = 0; l < width; ++l) {
      const T* row = data + (i + l) * from.row;
      for (std::int64_t j = 0; j < size; ++j) {
        to[j * width + l] = i + l < count ? widen(row[j]) : R(0);
      }
    }
  }
}

// ... and in row-major order.
template <class T, class R>
void copy_rows(const Rows& from, std::int64_t b, std::int64_t h, std::int64_t first,
               std::int64_t count, std::int64_t size, R* to) {
  const T* data = head_of<T>(from, b, h) + first * from.row;
  for (std::int64_t i = 0; i < count; ++i) {
    for (std::int64_t j = 0; j < size; ++j) to[i * size + j] = widen(data[i * from.row + j]);
  }
}

template <class T, class R>
void store_rows(const Rows& to, std::int64_t b, std::int64_t h, std::int64_t first,
                std::int64_t count, std::int64_t size, const R* from, R factor) {
  T* data = static_cast<T*>(to.data) + b * to.batch + h * to.head + first * to.row;
  for (std::int64_t i = 0; i < count; ++i) {
    const R* row = from + i * padded<R>(size);
    for (std::int64_t j = 0; j < size; ++j) narrow(row[j] * factor, data[i * to.row + j]);
  }
}

template <class R>
R total(const R* lanes) {
  R sum = 0;
  for (int l = 0; l < Width<R>::columns; ++l) sum += lanes[l];
  return sum;
}

// Queries that are computed at a time: blocks of equal size whose scores take half a megabyte.
constexpr std::int64_t kMostQueries = 72;

template <class R>
std::int64_t queries_of(const Problem& p) {
  const std::int64_t room = (1 << 19) / (4 * std::int64_t(sizeof(R)) * padded<R>(p.m));
  const std::int64_t most = room < kRows ? kRows : room > kMostQueries ? kMostQueries : room;
  const std::int64_t blocks = (p.n + most - 1) / most, each = (p.n + blocks - 1) / blocks;
  return (each + kRows - 1) / kRows * kRows;
}

// Consecutive pieces of scratch memory; measures where base is null.
struct Scratch {
  char* base;
  std::int64_t used = 0;

  template <class R>
  R* take(bool wanted, std::int64_t count) {
    if (!wanted) return nullptr;
    R* place = base == nullptr ? nullptr : reinterpret_cast<R*>(base + used);
    used += (count * std::int64_t(sizeof(R)) + 63) / 64 * 64;
    return place;
  }
};

enum class Order { Forward, Backward, DoubleBackward };

template <class R>
struct Workspace {
  std::int64_t queries, keys, size;                    // keys and size rounded up to panels
  R *k_columns, *v_columns, *ak_columns, *av_columns;  // packed for products with rows of queries
  R *k_rows, *v_rows, *ak_rows, *av_rows;              // packed for products with scores
  R *q, *grad, *aq;                                    // of a block of queries, in row-major order
  R *q_rows, *grad_rows, *aq_rows;                     // and packed for products with scores
  R *s, *dp, *t, *u;                                   // its scores
  R* result;                                           // its rows of an output
  R *for_k, *for_v;

  Workspace(const Problem& p, Order order, Scratch& scratch)
      : queries(queries_of<R>(p)), keys(padded<R>(p.m)), size(padded<R>(p.size)) {
    const bool first = order != Order::Forward, second = order == Order::DoubleBackward;
    const auto columns = [&](bool wanted) { return scratch.take<R>(wanted, keys * p.size); };
    const auto rows = [&](bool wanted) { return scratch.take<R>(wanted, p.m * size); };
    const auto plain = [&](bool wanted) { return scratch.take<R>(wanted, queries * p.size); };
    const auto packed = [&](bool wanted) { return scratch.take<R>(wanted, queries * size); };
    const auto scores = [&](bool wanted) { return scratch.take<R>(wanted, queries * keys); };
    k_columns = columns(true);
    v_columns = columns(first);
    ak_columns = columns(p.ak.data);
    av_columns = columns(p.av.data);
    k_rows = rows(p.for_q.data);
    v_rows = rows(!first || p.for_grad.data);
    ak_rows = rows(p.ak.data && p.for_q.data);
    av_rows = rows(p.av.data && p.for_grad.data);
    q = plain(true);
    grad = plain(first);
    aq = plain(p.aq.data);
    q_rows = packed(p.for_k.data);
    grad_rows = packed(p.for_v.data);
    aq_rows = packed(p.aq.data && p.for_k.data);
    s = scores(true);
    dp = scores(first);
    t = scores(second);
    u = scores(second);
    result = packed(true);
    for_k = rows(p.for_k.data);
    for_v = rows(p.for_v.data);
  }
};

template <class T, class P, class R = typename P::real>
struct Head {
  const Problem& p;
  const std::int64_t b, h;
  Scratch scratch;
  Workspace<R> w;
  const R scale;
  R* const lse;

  Head(const Problem& p, Order order, std::int64_t b, std::int64_t h, void* memory)
      : p(p),
        b(b),
        h(h),
        scratch{static_cast<char*>(memory)},
        w(p, order, scratch),
        scale(R(p.scale)),
        lse(static_cast<R*>(p.lse) + (b * p.heads + h) * p.n) {}

  void pack(const Rows& from, R* rows, R* columns) {
    if (from.data == nullptr) return;
    if (rows != nullptr) pack_rows<T>(from, b, h, 0, p.m, p.size, rows);
    if (columns != nullptr) pack_columns<T>(from, b, h, p.m, p.size, columns);
  }

  void load(const Rows& from, std::int64_t first, std::int64_t count, R* plain, R* packed) {
    if (from.data == nullptr) return;
    if (plain != nullptr) copy_rows<T>(from, b, h, first, count, p.size, plain);
    if (packed != nullptr) pack_rows<T>(from, b, h, first, count, p.size, packed);
  }

  // The scores of a block: one row for each query, one column for each key.
  void each(std::int64_t count, const R* of_queries, const R* of_keys, R* scores, bool add) {
    multiply<R>(count, p.size, p.m, {of_queries, p.size, 1}, of_keys, scores, w.keys, add);
  }

  void sum_over_keys(std::int64_t count, const R* scores, const R* rows, R* result, bool add) {
    multiply<R>(count, p.m, p.size, {scores, w.keys, 1}, rows, result, w.size, add);
  }

  void sum_over_queries(std::int64_t count, const R* scores, const R* rows, R* result, bool add) {
    multiply<R>(p.m, count, p.size, {scores, 1, w.keys}, rows, result, w.size, add);
  }

  // row = factor row + bias, and -inf or 0 beyond the last key
  void finish_row(R* __restrict row, std::int64_t query, R factor, const Scores& bias, R beyond) {
    for (std::int64_t j = 0; j < w.keys; ++j) row[j] *= factor;
    if (bias.data != nullptr) {
      const T* from = static_cast<const T*>(bias.data) + b % p.period * bias.element +
                      h * bias.head + query * bias.query;
      if (bias.key == 1) {
        for (std::int64_t j = 0; j < p.m; ++j) row[j] += widen(from[j]);
      } else {
        for (std::int64_t j = 0; j < p.m; ++j) row[j] += widen(from[j * bias.key]);
      }
    }
    for (std::int64_t j = p.m; j < w.keys; ++j) row[j] = beyond;
  }

  static constexpr R infinity = std::numeric_limits<R>::infinity();
  static constexpr int lanes = Width<R>::columns;

  // S of a block of queries; -inf beyond the last key
  void scores(std::int64_t first, std::int64_t count) {
    load(p.q, first, count, w.q, w.q_rows);
    each(count, w.q, w.k_columns, w.s, false);
    for (std::int64_t i = 0; i < count; ++i) {
      finish_row(w.s + i * w.keys, first + i, scale, p.bias, -infinity);
    }
  }

  void forward() {
    pack(p.k, nullptr, w.k_columns);
    pack(p.v, w.v_rows, nullptr);
    for (std::int64_t first = 0; first < p.n; first += w.queries) {
      const std::int64_t count = p.n - first < w.queries ? p.n - first : w.queries;
      scores(first, count);
      R inverse[kMostQueries];
      for (std::int64_t i = 0; i < count; ++i) {
        R* __restrict row = w.s + i * w.keys;
        R many[lanes];
        for (int l = 0; l < lanes; ++l) many[l] = -infinity;
        for (std::int64_t j = 0; j < w.keys; j += lanes) {
          for (int l = 0; l < lanes; ++l) many[l] = row[j + l] > many[l] ? row[j + l] : many[l];
        }
        R highest = -infinity;
        for (int l = 0; l < lanes; ++l) highest = many[l] > highest ? many[l] : highest;
        const R shift = highest == -infinity ? R(0) : highest;
        for (int l = 0; l < lanes; ++l) many[l] = 0;
        for (std::int64_t j = 0; j < w.keys; j += lanes) {
          for (int l = 0; l < lanes; ++l) {
            row[j + l] = exp_negative<P>(row[j + l] - shift);
            many[l] += row[j + l];
          }
        }
        const R sum = total(many);
        inverse[i] = sum == 0 ? R(1) : 1 / sum;
        lse[first + i] = sum == 0 ? infinity : shift + std::log(sum);
      }
      sum_over_keys(count, w.s, w.v_rows, w.result, false);
      for (std::int64_t i = 0; i < count; ++i) {
        store_rows<T>(p.out, b, h, first + i, 1, p.size, w.result + i * w.size, inverse[i]);
      }
    }
  }

  void add_to(R* sums, std::int64_t first, std::int64_t count, const R* scores) {
    if (sums == nullptr) return;
    for (std::int64_t i = 0; i < count; ++i) {
      R* __restrict to = sums + (first + i) * p.m;
      for (std::int64_t j = 0; j < p.m; ++j) to[j] += scores[i * w.keys + j];
    }
  }

  void backward(R* sums) {
    const bool wants_ds = w.k_rows || w.q_rows || sums;
    pack(p.k, w.k_rows, w.k_columns);
    pack(p.v, nullptr, w.v_columns);
    for (std::int64_t first = 0; first < p.n; first += w.queries) {
      const std::int64_t count = p.n - first < w.queries ? p.n - first : w.queries;
      scores(first, count);
      load(p.grad, first, count, w.grad, w.grad_rows);
      if (wants_ds) each(count, w.grad, w.v_columns, w.dp, false);
      for (std::int64_t i = 0; i < count; ++i) {
        R* __restrict s = w.s + i * w.keys;
        R* __restrict dp = w.dp + i * w.keys;
        const R shift = lse[first + i];
        R many[lanes] = {};
        for (std::int64_t j = 0; j < w.keys; j += lanes) {
          for (int l = 0; l < lanes; ++l) {
            s[j + l] = exp_negative<P>(s[j + l] - shift);
            if (wants_ds) many[l] += s[j + l] * dp[j + l];
          }
        }
        if (!wants_ds) continue;
        const R delta = total(many);
        for (std::int64_t j = 0; j < w.keys; ++j) dp[j] = s[j] * (dp[j] - delta);
      }
      add_to(sums, first, count, w.dp);
      if (w.k_rows) {
        sum_over_keys(count, w.dp, w.k_rows, w.result, false);
        store_rows<T>(p.for_q, b, h, first, count, p.size, w.result, scale);
      }
      if (w.for_k) sum_over_queries(count, w.dp, w.q_rows, w.for_k, first > 0);
      if (w.for_v) sum_over_queries(count, w.s, w.grad_rows, w.for_v, first > 0);
    }
    store_keys();
  }

  void store_keys() {
    if (w.for_k) store_rows<T>(p.for_k, b, h, 0, p.m, p.size, w.for_k, scale);
    if (w.for_v) store_rows<T>(p.for_v, b, h, 0, p.m, p.size, w.for_v, R(1));
  }

  void double_backward(R* sums) {
    const bool has_t = p.aq.data || p.ak.data || p.abias.data;
    pack(p.k, w.k_rows, w.k_columns);
    pack(p.v, w.v_rows, w.v_columns);
    pack(p.ak, w.ak_rows, w.ak_columns);
    pack(p.av, w.av_rows, w.av_columns);
    for (std::int64_t first = 0; first < p.n; first += w.queries) {
      const std::int64_t count = p.n - first < w.queries ? p.n - first : w.queries;
      scores(first, count);
      load(p.grad, first, count, w.grad, w.grad_rows);
      load(p.aq, first, count, w.aq, w.aq_rows);
      each(count, w.grad, w.v_columns, w.dp, false);
      if (p.aq.data) each(count, w.aq, w.k_columns, w.t, false);
      if (p.ak.data) each(count, w.q, w.ak_columns, w.t, p.aq.data);
      if (p.av.data) each(count, w.grad, w.av_columns, w.u, false);
      if (!p.aq.data && !p.ak.data) clear(w.t, count * w.keys);
      if (!p.av.data) clear(w.u, count * w.keys);
      for (std::int64_t i = 0; i < count; ++i) {
        finish_row(w.t + i * w.keys, first + i, scale, p.abias, 0);
        differentiate_row(first + i, i * w.keys);
      }
      // Now s holds P, t holds G, dp holds dS and u holds aS.
      add_to(sums, first, count, w.u);
      if (w.v_rows) {
        if (has_t) sum_over_keys(count, w.t, w.v_rows, w.result, false);
        if (p.av.data) sum_over_keys(count, w.s, w.av_rows, w.result, has_t);
        store_rows<T>(p.for_grad, b, h, first, count, p.size, w.result, R(1));
      }
      if (w.k_rows) {
        sum_over_keys(count, w.u, w.k_rows, w.result, false);
        if (p.ak.data) sum_over_keys(count, w.dp, w.ak_rows, w.result, true);
        store_rows<T>(p.for_q, b, h, first, count, p.size, w.result, scale);
      }
      if (w.for_k) {
        sum_over_queries(count, w.u, w.q_rows, w.for_k, first > 0);
        if (p.aq.data) sum_over_queries(count, w.dp, w.aq_rows, w.for_k, true);
      }
      if (w.for_v) sum_over_queries(count, w.t, w.grad_rows, w.for_v, first > 0);
    }
    store_keys();
  }

  static void clear(R* data, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) data[i] = 0;
  }

  void differentiate_row(std::int64_t query, std::int64_t offset) {
    R* __restrict s = w.s + offset;
    R* __restrict dp = w.dp + offset;
    R* __restrict t = w.t + offset;
    R* __restrict u = w.u + offset;
    const R shift = lse[query];
    R taus[lanes] = {}, deltas[lanes] = {}, rhos[lanes] = {};
    for (std::int64_t j = 0; j < w.keys; j += lanes) {
      for (int l = 0; l < lanes; ++l) {
        const R probability = exp_negative<P>(s[j + l] - shift);
        s[j + l] = probability;
        taus[l] += probability * t[j + l];
        deltas[l] += probability * dp[j + l];
        rhos[l] += probability * (t[j + l] * dp[j + l] + u[j + l]);
      }
    }
    const R tau = total(taus), delta = total(deltas), rho = total(rhos) - 2 * tau * delta;
    for (std::int64_t j = 0; j < w.keys; ++j) {
      const R probability = s[j], centred = dp[j] - delta;
      u[j] = probability * (t[j] * centred - tau * dp[j] + u[j] - rho);
      t[j] = probability * (t[j] - tau);
      dp[j] = probability * centred;
    }
  }
};

// Calls f(element, precision), objects that carry a type each.
template <class F>
void with_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::Float16: return f(float16{}, Single{});
    case Dtype::BFloat16: return f(bfloat16{}, Single{});
    case Dtype::Float32: return f(float{}, Single{});
    case Dtype::Float64: return f(double{}, Double{});
  }
}

Order order_of(const Problem& p) {
  const bool second = p.aq.data || p.ak.data || p.av.data || p.abias.data;
  return second ? Order::DoubleBackward : p.grad.data ? Order::Backward : Order::Forward;
}

std::int64_t scratch_bytes(const Problem& p) {
  Scratch scratch{nullptr};
  with_dtype(p.dtype, [&](auto, auto precision) {
    Workspace<typename decltype(precision)::real>(p, order_of(p), scratch);
  });
  return scratch.used;
}

void forward(const Problem& p, std::int64_t b, std::int64_t h, void* scratch) {
  with_dtype(p.dtype, [&](auto element, auto precision) {
    Head<decltype(element), decltype(precision)>(p, Order::Forward, b, h, scratch).forward();
  });
}

void backward(const Problem& p, std::int64_t b, std::int64_t h, void* scratch, void* sums) {
  with_dtype(p.dtype, [&](auto element, auto precision) {
    using R = typename decltype(precision)::real;
    Head<decltype(element), decltype(precision)>(p, Order::Backward, b, h, scratch)
        .backward(static_cast<R*>(sums));
  });
}

void double_backward(const Problem& p, std::int64_t b, std::int64_t h, void* scratch, void* sums) {
  with_dtype(p.dtype, [&](auto element, auto precision) {
    using R = typename decltype(precision)::real;
    Head<decltype(element), decltype(precision)>(p, Order::DoubleBackward, b, h, scratch)
        .double_backward(static_cast<R*>(sums));
  });
}

}  // namespace

extern const Kernels GN_KERNELS_ISA;
const Kernels GN_KERNELS_ISA = {scratch_bytes, forward, backward, double_backward};

}  // namespace gn_kernels::attention
