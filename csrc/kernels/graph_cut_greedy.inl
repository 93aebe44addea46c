// CPU body: see graph_cut_greedy.h for what is computed.
#include "graph_cut_greedy.h"
#include "vocabulary/cpu_vocabulary.h"

namespace pydistill {
namespace {

using Call = GraphCutGreedy;
using R = Register<double>;
constexpr int kLanes = Registers<double>::lanes;

template <class S>
PYDISTILL_INLINE R load_doubles(const S* p) {
  typedef S Part __attribute__((vector_size(kLanes * sizeof(S)), aligned(sizeof(S))));
  return __builtin_convertvector(*reinterpret_cast<const Part*>(p), R);
}

PYDISTILL_INLINE double sum_of(R v) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

PYDISTILL_INLINE double largest(const double* values, int64_t count) {
  double best = -__builtin_inf();
  int64_t i = 0;
  if (count >= kLanes) {
    R lanes = load_register(values);
    for (i = kLanes; i + kLanes <= count; i += kLanes) {
      const R next = load_register(values + i);
      lanes = next > lanes ? next : lanes;
    }
    for (int lane = 0; lane < kLanes; ++lane) best = lanes[lane] > best ? lanes[lane] : best;
  }
  for (; i < count; ++i) best = values[i] > best ? values[i] : best;
  return best;
}

PYDISTILL_INLINE int64_t first_from(const double* values, double floor) {
  int64_t i = 0;
  while (values[i] < floor) ++i;
  return i;
}

// Dot products of kRows embeddings with kColumns rows of `moved`.
template <int kRows, int kColumns, class S>
PYDISTILL_INLINE void products(const S* const (&rows)[kRows], const double* moved, int64_t d,
                               double (&out)[kRows][kColumns]) {
  R sum[kRows][kColumns] = {};
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    R x[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) x[r] = load_doubles(rows[r] + i);
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      const R w = load_register(moved + c * (d + 1) + i);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r][c] = multiply_add(x[r], w, sum[r][c]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kColumns; ++c) {
      double rest = 0;
      for (int64_t j = i; j < d; ++j) rest += static_cast<double>(rows[r][j]) * moved[c * (d + 1) + j];
      out[r][c] = sum_of(sum[r][c]) + rest;
    }
}

template <class S>
class Greedy {
 public:
  explicit Greedy(Call& call)
      : call(call),
        N(call.N),
        d(call.d),
        C(call.C),
        width(call.d + 1),
        directions(call.directions()),
        embeddings(static_cast<const S*>(call.embeddings)),
        factors(static_cast<const S*>(call.factors)) {}

  // One over the lengths of samples [begin, end).
  void scale(int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      double square = squared(embeddings + j * d, d);
      if (factors) square = (square + 1) * squared(factors + j * C, C);
      call.scale[j] = square > 0 ? 1 / __builtin_sqrt(square) : 0;
    }
  }

  // The sum of all vectors, panels [begin, end) of its columns.
  void total(int64_t begin, int64_t end) {
    constexpr int64_t panel = Call::kPanel, rows = 8;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * panel, count = width - first < panel ? width - first : panel;
      const int64_t embedded = d - first < count ? d - first : count;
      for (int64_t c = 0; c < C; ++c)
        for (int64_t i = 0; i < count; ++i) call.moved[c * width + first + i] = 0;
      for (int64_t j = 0; j < N; j += rows) {
        const int64_t here = N - j < rows ? N - j : rows;
        alignas(64) double x[rows][panel];
        for (int64_t r = 0; r < here; ++r) {
          const S* const row = embeddings + (j + r) * d + first;
          for (int64_t i = 0; i < embedded; ++i) x[r][i] = row[i];
          if (embedded < count) x[r][embedded] = one();
        }
        for (int64_t c = 0; c < C; ++c) {
          double* const sum = call.moved + c * width + first;
          for (int64_t r = 0; r < here; ++r) {
            const double w = weight(j + r, c);
            for (int64_t i = 0; i < count; ++i) sum[i] += w * x[r][i];
          }
        }
      }
    }
  }

  // Subtracts what has moved from the gains of samples [begin, end); the first time it computes gains and coordinates.
  void pass(int64_t begin, int64_t end) {
    const bool first = call.picked == 0;
    double inverse[Call::kMaxDirections] = {};
    if (first) {
      for (int64_t g = 0; g < directions; ++g) inverse[g] = squared(moved_of(g), rows_of(g) * width);
      for (double& length : inverse) length = length > 0 ? 1 / __builtin_sqrt(length) : 0;
    }
    for_rows(
        begin, end, [](int64_t j) { return j; },
        [&](int64_t j, const double (&along)[Call::kMaxDirections]) {
          double sum = 0, inside = 0;
          for (int64_t g = 0; g < directions; ++g) {
            sum += along[g];
            const double coordinate = along[g] * inverse[g];
            inside += coordinate * coordinate;
            if (first) call.along[g * N + j] = coordinate;
          }
          if (first) {
            call.gain[j] = 0.5 * call.lam * (static_cast<double>(N) + sum);
            call.outside[j] = length_beside(1, inside);
          } else {
            call.gain[j] -= sum;
          }
          call.estimate[j] = call.gain[j];
        });
  }

  // Picks after a pass, until there is nothing to pick or the next pass is needed.
  void pick() {
    for (int64_t i = 0; i < C * width; ++i) call.moved[i] = 0;
    double along_moved[Call::kMaxDirections] = {};
    take(first_from(call.gain, largest(call.gain, N) - Call::kTie), along_moved);
    int64_t read = 0;
    while (call.picked < call.budget) {
      double inside = 0;
      for (int64_t g = 0; g < directions; ++g) inside += along_moved[g] * along_moved[g];
      const double radius = length_beside(squared(call.moved, C * width), inside);
      call.near[0] = first_from(call.estimate, largest(call.estimate, N));
      make_exact(1);
      const int64_t count = find_near(radius, call.exact[0] - 2 * Call::kTie);
      read += count;
      if (read > 2 * N || count > N / 4) return;  // reading them all in order costs no more
      make_exact(count);
      take(call.near[first_from(call.exact, largest(call.exact, count) - Call::kTie)], along_moved);
    }
  }

 private:
  Call& call;
  const int64_t N, d, C, width, directions;
  const S *const embeddings, *const factors;

  // For a vector of square length `whole`, the length of its rest beside the part of square length `inside`; an upper
  // bound despite rounding.
  static double length_beside(double whole, double inside) {
    const double square = whole - inside;
    return __builtin_sqrt((square > 0 ? square : 0) + 1e-14 * whole);
  }
  double one() const { return factors ? 1 : 0; }
  double weight(int64_t j, int64_t c) const { return factors ? factors[j * C + c] * call.scale[j] : call.scale[j]; }
  const double* moved_of(int64_t g) const { return call.moved + g * call.rows_of_direction() * width; }
  int64_t rows_of(int64_t g) const {
    const int64_t rows = call.rows_of_direction(), left = C - g * rows;
    return left < rows ? left : rows;
  }

  template <class E>
  static double squared(const E* values, int64_t count) {
    R sum{};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      const R x = load_doubles(values + i);
      sum = multiply_add(x, x, sum);
    }
    double rest = sum_of(sum);
    for (; i < count; ++i) rest += static_cast<double>(values[i]) * values[i];
    return rest;
  }

  // Calls visit(k, products of sample index(k) with what has moved, summed over each direction's rows).
  template <class Index, class Visit>
  PYDISTILL_INLINE void for_rows(int64_t begin, int64_t end, Index index, Visit visit) {
    if (C == 1)
      for_rows_of<8, 1>(begin, end, index, visit);
    else
      for_rows_of<3, 4>(begin, end, index, visit);
  }

  template <int kRows, int kColumns, class Index, class Visit>
  PYDISTILL_INLINE void for_rows_of(int64_t begin, int64_t end, Index index, Visit visit) {
    for (int64_t k = begin; k < end; k += kRows) {
      int64_t samples[kRows];
      const S* rows[kRows];
      double along[kRows][Call::kMaxDirections] = {};
      for (int r = 0; r < kRows; ++r) {
        samples[r] = index(k + r < end ? k + r : end - 1);
        rows[r] = embeddings + samples[r] * d;
      }
      int64_t c = 0;
      for (; c + kColumns <= C; c += kColumns) add_products<kRows, kColumns>(samples, rows, c, along);
      if (kColumns > 1 && c + 2 <= C) add_products<kRows, 2>(samples, rows, c, along), c += 2;
      if (c < C) add_products<kRows, 1>(samples, rows, c, along);
      for (int r = 0; r < kRows && k + r < end; ++r) visit(k + r, along[r]);
    }
  }

  template <int kRows, int kColumns>
  PYDISTILL_INLINE void add_products(const int64_t (&samples)[kRows], const S* const (&rows)[kRows], int64_t c,
                                     double (&along)[kRows][Call::kMaxDirections]) {
    double out[kRows][kColumns];
    products(rows, call.moved + c * width, d, out);
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < kColumns; ++i) {
        const double with_one = out[r][i] + one() * call.moved[(c + i) * width + d];
        along[r][(c + i) / call.rows_of_direction()] += weight(samples[r], c + i) * with_one;
      }
  }

  // The gains of the first `count` candidates.
  void make_exact(int64_t count) {
    for_rows(
        0, count, [&](int64_t k) { return call.near[k]; },
        [&](int64_t k, const double (&along)[Call::kMaxDirections]) {
          double sum = 0;
          for (int64_t g = 0; g < directions; ++g) sum += along[g];
          call.exact[k] = call.gain[call.near[k]] - sum;
        });
  }

  // Finds the samples that can be as good as `floor`; returns how many.
  int64_t find_near(double radius, double floor) {
    constexpr int64_t block = 64;
    int64_t count = 0;
    for (int64_t first = 0; first < N; first += block) {
      const int64_t here = N - first < block ? N - first : block;
      alignas(64) double bound[block];
      for (int64_t i = 0; i < here; ++i) bound[i] = call.estimate[first + i] + radius * call.outside[first + i];
      if (largest(bound, here) < floor) continue;
      for (int64_t i = 0; i < here; ++i)
        if (bound[i] >= floor) call.near[count++] = first + i;
    }
    return count;
  }

  void take(int64_t pick, double (&along_moved)[Call::kMaxDirections]) {
    call.picks[call.picked++] = pick;
    const S* const row = embeddings + pick * d;
    for (int64_t c = 0; c < C; ++c) {
      const double w = weight(pick, c);
      double* const moved = call.moved + c * width;
      for (int64_t i = 0; i < d; ++i) moved[i] += w * row[i];
      moved[d] += w * one();
    }
    constexpr int64_t block = 512;  // estimates that stay in the nearest cache for all directions
    double of_pick[Call::kMaxDirections];
    for (int64_t g = 0; g < directions; ++g) along_moved[g] += of_pick[g] = call.along[g * N + pick];
    for (int64_t first = 0; first < N; first += block) {
      const int64_t end = N - first < block ? N : first + block;
      for (int64_t g = 0; g < directions; ++g)
        for (int64_t j = first; j < end; ++j) call.estimate[j] -= of_pick[g] * call.along[g * N + j];
    }
    call.gain[pick] = call.estimate[pick] = -__builtin_inf();  // and so below any floor
  }
};

template <class S>
void run(Call& call, int64_t begin, int64_t end) {
  Greedy<S> greedy(call);
  if (call.form == Call::Form::scale) greedy.scale(begin, end);
  if (call.form == Call::Form::total) greedy.total(begin, end);
  if (call.form == Call::Form::pass) greedy.pass(begin, end);
  if (call.form == Call::Form::pick) greedy.pick();
}

}  // namespace

void PYDISTILL_KERNEL(GraphCutGreedy& call, int64_t begin, int64_t end) {
  if (call.scalar == Scalar::f64)
    run<double>(call, begin, end);
  else
    run<float>(call, begin, end);
}

}  // namespace pydistill
