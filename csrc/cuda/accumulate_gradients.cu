// Sums of the parameters' gradients, meaning as in rampde.eager.accumulate_gradients: one launch
// for all parameters and stages.

#include "../boxing.h"
#include "../gradients.h"
#include "../scale_state.h"
#include "chunks.h"
#include "launch.h"
#include "sum.cuh"

namespace rampde::cuda {
namespace {

// The totals of one launch, each with its stretch of the list of gradients.
template <int kTotals, int kGradients>
struct Batch {
  static constexpr int kGradientCapacity = kGradients;

  Chunks<kTotals> chunks;
  void* total[kTotals];
  const void* gradient[kGradients];
  int end[kTotals];  // of the total's gradients, which begin where the previous total's end
  DType total_dtype[kTotals];
  DType gradient_dtype[kGradients];
  bool aligned[kTotals];
  int gradients = 0;

  bool full() const { return chunks.full() || gradients == kGradients; }
};

// every launch takes 4 KiB of arguments at little cost; CUDA 12.1 and later up to 32764 bytes
using SmallBatch = Batch<40, 220>;
using LargeBatch = Batch<300, 2100>;
static_assert(sizeof(SmallBatch) <= 4000 && sizeof(LargeBatch) <= 32000);

template <class Batch>
__global__ void __launch_bounds__(kThreads)
    accumulate_kernel(const __grid_constant__ Batch batch, const void* h, DType h_dtype,
                      const float* scale_state) {
  double step = read_scalar(h, h_dtype);
  if (scale_state != nullptr) {
    const float scale = scale_state[kScaleOfStep];
    if (scale == 0.0f) return;
    step /= scale;
  }
  const auto place = batch.chunks.find(blockIdx.x);
  const int p = place.tensor;
  const auto accumulate = [&]<class Accumulator>() {
    const auto factor = static_cast<Accumulator>(step);
    for_each_vector(place.begin, place.end, batch.aligned[p], threadIdx.x, kThreads,
                    [&]<int kCount>(int64_t i) {
                      Pack<Accumulator, kCount> sums = read<kCount, Accumulator>(batch.total[p], i);
                      for (int j = p > 0 ? batch.end[p - 1] : 0; j < batch.end[p]; ++j) {
                        add_scaled(sums.item, factor, batch.gradient[j], batch.gradient_dtype[j],
                                   i);
                      }
                      write<kCount, Accumulator>(batch.total[p], i, sums);
                    });
  };
  if (batch.total_dtype[p] == DType::Float64) {
    accumulate.template operator()<double>();
  } else {
    accumulate.template operator()<float>();
  }
}

template <class Batch>
void accumulate(const Launcher& launch, const TensorList& totals,
                const OptionalTensorList& gradients, const Operand& step,
                const float* scale_state) {
  Batch batch;
  TensorList copies;
  const auto flush = [&] {
    launch(accumulate_kernel<Batch>, batch.chunks.blocks(), kThreads, batch, step.data, step.dtype,
           scale_state);
    batch.chunks.tensors = 0;
    batch.gradients = 0;
  };
  for (size_t p = 0; p < totals.size(); ++p) {
    const Output total = check_total(totals, p);
    int index = -1;  // of the total in the batch, which it enters with its first gradient
    for (size_t i = p; i < gradients.size(); i += totals.size()) {
      if (!gradients[i]) continue;
      const Operand gradient = check_gradient(gradients, i, totals, copies);
      if (totals[p].numel() == 0) continue;
      if (index < 0) {
        index = batch.chunks.add(totals[p].numel());
        batch.total[index] = total.data;
        batch.total_dtype[index] = total.dtype;
        batch.aligned[index] = is_aligned(total.data);
      }
      batch.gradient[batch.gradients] = gradient.data;
      batch.gradient_dtype[batch.gradients] = gradient.dtype;
      batch.aligned[index] = batch.aligned[index] && is_aligned(gradient.data);
      batch.end[index] = ++batch.gradients;
      if (batch.gradients == Batch::kGradientCapacity) {
        flush();
        index = -1;
      }
    }
    if (batch.full()) flush();
  }
  flush();
}

void accumulate_gradients(const TensorList& totals, const OptionalTensorList& gradients,
                          const Tensor& h, const std::optional<Tensor>& scale_state) {
  constexpr const char* op = "accumulate_gradients";
  check_counts(totals.size(), gradients.size());
  if (totals.empty()) return;
  const Launcher launch(op, totals[0]);
  const Operand step = read_step_size(op, h, "totals[0]", totals[0]);
  const float* scaling =
      scale_state ? read_scale_state(op, *scale_state, "totals[0]", totals[0]) : nullptr;
  if (totals.size() <= 40 && gradients.size() <= 220) {
    accumulate<SmallBatch>(launch, totals, gradients, step, scaling);
  } else {
    accumulate<LargeBatch>(launch, totals, gradients, step, scaling);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rampde, CUDA, m) {
  m.impl("accumulate_gradients", boxed<&accumulate_gradients>);
}

}  // namespace rampde::cuda
