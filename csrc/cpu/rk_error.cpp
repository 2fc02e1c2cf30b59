// End of an attempted Runge-Kutta step, meaning as in rampde.eager.rk_error.

#include <algorithm>
#include <limits>

#include "../boxing.h"
#include "../leaves.h"
#include "fp8.h"

namespace rampde::cpu {
namespace {

// How rows of `length` elements are cut: a piece is some whole rows, or one of the parts of a row.
struct Pieces {
  Pieces(int64_t rows, int64_t length)
      : rows_each(std::max<int64_t>(1, kBlock / length)),
        parts((length + kBlock - 1) / kBlock),
        count((rows + rows_each - 1) / rows_each * parts),
        span(rows_each * length),
        numel(rows * length) {}
  int64_t begin(int64_t piece) const { return piece / parts * span + piece % parts * kBlock; }
  int64_t end(int64_t piece) const {
    return std::min({begin(piece) + kBlock, (piece / parts + 1) * span, numel});
  }

  int64_t rows_each, parts, count, span, numel;
};

// The weighted error of a block: its sum over the terms, and the sum of its squares.
template <class Accumulator>
struct Errors {
  Accumulator weights[kBlock], ratios[kBlock], shares[kBlock];

  void start(const Operand& y, const Accumulator* next, double rtol, double atol, int64_t begin,
             int64_t count) {
    // so that a weight is finite, and 0 / 0 is 0
    const double smallest = std::numeric_limits<Accumulator>::min();
    load(weights, y, begin, count);
    sum_kernels<Accumulator>().weigh(weights, ratios, next, static_cast<Accumulator>(rtol),
                                     static_cast<Accumulator>(atol + smallest), count);
    std::fill_n(shares, count, Accumulator{0});
  }
  void add(const Terms& terms, double h, int64_t begin, int64_t count) {
    for (int j = 0; j < terms.count; ++j) {
      const Terms::Term& term = terms.term[j];
      sum_kernels<Accumulator>().add_error[static_cast<int>(term.dtype)](
          ratios, shares, weights, at(term.data, term.dtype, begin),
          static_cast<Accumulator>(h * term.coefficient), count);
    }
  }
  // `sums[2 * r]` and `sums[2 * r + 1]`: those of row r
  void sum(double* sums, int64_t rows, int64_t length) const {
    double wide[kBlock];
    sum_kernels<Accumulator>().square(wide, ratios, rows * length);
    kernels().sum_rows(sums, wide, rows, length);
    sum_kernels<Accumulator>().load_finite(wide, shares, rows * length);
    kernels().sum_rows(sums + 1, wide, rows, length);
  }
};

void check_rows(const char* op, int64_t rows, const Tensor& y) {
  const int64_t slices = y.dim() > 0 ? y.size(0) : 1;
  check(rows == 1 || rows == slices, "rampde::", op, ": rows is ", rows,
        ", expected 1 or the size of y along dimension 0, ", slices);
  check(rows == 1 || is_contiguous(y), "rampde::", op, ": y of shape ", Shape{y},
        " is not contiguous, expected so for rows other than 1: call contiguous() on it first");
}

Tensor rk_error(const Tensor& y, const TensorList& k, const Tensor& h, const std::vector<double>& b,
                const std::vector<double>& e, const double& rtol, const double& atol,
                const double& roundoff, const int64_t& rows, const std::optional<Tensor>& y_next,
                const std::optional<Tensor>& checkpoint, const std::optional<Tensor>& compensation,
                const std::optional<Tensor>& quantised, const std::optional<Tensor>& block_scales,
                const std::optional<int64_t>& seed) {
  constexpr const char* op = "rk_error";
  const DType state_dtype = check_state({op, "y"}, y);
  check_rows(op, rows, y);
  check_coefficients({op, "k"}, k, "b", b);
  check_coefficients({op, "k"}, k, "e", e);
  Terms terms;
  read_terms(terms, {op, "k"}, k, "y", y, [&](size_t j) { return b[j] != 0.0 ? b[j] : e[j]; });
  const double step_size = read_scalar(read_step_size(op, h, "y", y));
  Terms in_step, in_error;
  for (size_t j = 0, used = 0; j < k.size(); ++j) {
    if (b[j] == 0.0 && e[j] == 0.0) continue;
    const Operand operand{terms.term[used].data, terms.term[used].dtype};
    if (b[j] != 0.0) in_step.add(operand, b[j]);
    if (e[j] != 0.0) in_error.add(operand, e[j]);
    ++used;
  }
  const Operand base{y.data(), state_dtype};
  std::optional<Output> next, saved, lost;
  if (y_next) next = write_operand({op, "y_next"}, *y_next, "y", y);
  if (checkpoint) saved = write_operand({op, "checkpoint"}, *checkpoint, "y", y);
  if (compensation) lost = write_operand({op, "compensation"}, *compensation, "y", y);
  const std::optional<QuantisedOutput> backwards =
      write_quantised({op, "quantised"}, quantised, block_scales, seed, "y", y);
  check(!backwards || rows == 1, "rampde::", op, ": rows is ", rows,
        ", expected 1 where quantised is given");

  Tensor result = y.empty_matrix(rows, 2, aoti_torch_dtype_float64());
  auto* const sums = static_cast<double*>(result.mutable_data());
  std::fill_n(sums, 2 * rows, 0.0);
  if (y.numel() == 0) return result;
  const int64_t length = y.numel() / rows;
  const Pieces pieces(rows, length);
  std::vector<double> partial(2 * rows * pieces.parts);

  with_accumulator(lost ? lost->dtype : state_dtype, [&]<class Accumulator>() {
    for_each_piece(pieces.count, [&](int64_t piece) {
      const int64_t begin = pieces.begin(piece), count = pieces.end(piece) - begin;
      Accumulator total[kBlock];
      step(total, base, in_step, step_size, lost, backwards, begin, count);
      Errors<Accumulator> errors;
      errors.start(base, total, rtol, atol, begin, count);
      errors.add(in_error, step_size, begin, count);
      // last, since y and the velocities may be the output itself
      if (next) store(*next, total, begin, count);
      if (saved) store(*saved, total, begin, count);
      const int64_t lines = std::max<int64_t>(1, count / length);
      errors.sum(&partial[2 * piece * pieces.rows_each], lines, count / lines);
    });
  });
  for (int64_t row = 0; row < rows; ++row) {
    double ratio = 0.0, share = 0.0;
    for (int64_t i = row * pieces.parts; i < (row + 1) * pieces.parts; ++i) {
      ratio += partial[2 * i];
      share += partial[2 * i + 1];
    }
    // of numbers that are not negative: not a number only if one of them is not
    sums[2 * row] = std::isnan(ratio) ? INFINITY : ratio;
    sums[2 * row + 1] = share * (roundoff * roundoff);
  }
  return result;
}

Tensor rk_error_leaves(const TensorList& y, TensorList& k, const Tensor& h,
                       const std::vector<double>& b, const std::vector<double>& e,
                       const double& rtol, const double& atol, const std::vector<double>& roundoffs,
                       TensorList& y_next, TensorList& checkpoints, TensorList& compensations) {
  constexpr const char* op = "rk_error_leaves";
  check(!y.empty(), "rampde::", op, ": y is empty, expected at least one leaf");
  const size_t count = count_of_leaf({op, "k"}, k, y.size());
  check_one_of_leaf({op, "roundoffs"}, roundoffs, y.size());
  check_optional_leaves({op, "y_next"}, y_next, y.size());
  check_optional_leaves({op, "checkpoints"}, checkpoints, y.size());
  check_optional_leaves({op, "compensations"}, compensations, y.size());
  Tensor result = y[0].empty_matrix(y.size(), 2, aoti_torch_dtype_float64());
  auto* const sums = static_cast<double*>(result.mutable_data());
  for (size_t i = 0; i < y.size(); ++i) {
    const Tensor of_leaf = rk_error(y[i], take_leaf(k, i, count), h, b, e, rtol, atol, roundoffs[i],
                                    1, take_optional(y_next, i), take_optional(checkpoints, i),
                                    take_optional(compensations, i), {}, {}, {});
    std::copy_n(static_cast<const double*>(of_leaf.data()), 2, sums + 2 * i);
  }
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rampde, CPU, m) {
  m.impl("rk_error", boxed<&rk_error>);
  m.impl("rk_error_leaves", boxed<&rk_error_leaves>);
}

}  // namespace rampde::cpu
