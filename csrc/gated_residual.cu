// One thread takes a vector of 16 bytes of a row, adds all branches to it in fp32 and rounds once:
// every element is read once, and a warp reads 512 contiguous bytes of each operand. Traffic:
// (k + 2) B K D elements, one more with a cache; gates stay in L2.
//
// out may be x: a thread reads its elements of x before it writes the same elements of out.
#include "gated_residual.h"
#include "launch.h"
#include "vector.h"

namespace fd {
namespace cuda {
namespace {

constexpr int kGroup = 4;  // branches whose loads are under way at once, where there are several
constexpr int kThreads = 384;  // about: whole rows of the models' widths fit 2 or 1 times

// x may be transposed: then neighbouring rows share its sectors, and only x is read one by one.
template <class T, bool kAligned>
__device__ __forceinline__ void load_x(const Residual& p, int64_t b, int64_t k, int64_t i,
                                       int64_t n, float* values) {
  const T* x = p.x.row<T>(b, k) + i * p.x_step;
  if (p.x_step == 1) {
    to_floats<T>(load<kAligned>(x, n), values);
  } else {
#pragma unroll
    for (int j = 0; j < kElements<T>; ++j) values[j] = j < n ? to_float(x[j * p.x_step]) : 0.0f;
  }
}

// What a kernel of so many branches at a time is given; 128 take 6 KiB.
template <int kBranches>
using Given = Branches<kBranches == 1 ? 1 : kMaxBranches>;

// kWide: gates are fp32 beside 16 bits.
template <class T, int kBranches, bool kAligned, bool kWeighted, bool kWide>
__global__ void __launch_bounds__(kThreads, 2)
    gated_residual_kernel(const __grid_constant__ Given<kBranches> p, uint32_t rows) {
  const uint32_t row = blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= rows) return;
  const int64_t b = row / static_cast<uint32_t>(p.shape.tokens);
  const int64_t k = row % static_cast<uint32_t>(p.shape.tokens);
  const int64_t stored = p.rows.at(b, k);
  for (int64_t i = threadIdx.x * kElements<T>; i < p.shape.width; i += blockDim.x * kElements<T>) {
    const int64_t n = p.shape.width - i;
    float sum[kElements<T>];
    load_x<T, kAligned>(p, b, k, i, n, sum);
    Words fresh = {};
    for (int first = 0; first < p.count; first += kBranches) {
      Words branch[kBranches];
      Held<T, kWide> gate[kBranches];
      float weight[kBranches];
#pragma unroll
      for (int g = 0; g < kBranches; ++g) {
        const int j = first + g;
        branch[g] = {};
        gate[g] = {};
        weight[g] = 1.0f;
        if (j < p.count) {
          branch[g] =
              load<kAligned>(p.branches[j].template row<T>(b, j == p.fresh ? k : stored) + i, n);
          if constexpr (kWeighted) {
            if (!kWide || p.weights) weight[g] = p.weights.at(j, row);
          }
          if (p.gates[j]) gate[g] = held<T, kAligned, kWide>(p.gates[j], kWide, b, k, i, n);
        }
      }
#pragma unroll
      for (int g = 0; g < kBranches; ++g) {
        const int j = first + g;
        if (j < p.count) {
          add<T, kWeighted>(branch[g], static_cast<bool>(p.gates[j]), gate[g], sum, weight[g]);
          if (j == p.fresh) fresh = branch[g];
        }
      }
    }
    if (p.cache) store<kAligned>(p.cache.template row<T>(b, stored) + i, fresh, n);
    store<kAligned>(p.out.template row<T>(b, k) + i, from_floats<T>(sum), n);
  }
}

template <class T>
bool all_aligned(const GatedResidual& p) {
  bool yes = p.shape.width % kElements<T> == 0 && aligned<T>(p.out) && aligned<T>(p.cache);
  yes = yes && (p.x_step != 1 || aligned<T>(p.x));
  for (int j = 0; j < p.count; ++j) {
    yes = yes && aligned<T>(p.branches[j]) && aligned<T>(p.gates[j], p.wide);
  }
  return yes;
}

inline const GatedResidual& given(const GatedResidual& p, const GatedResidual*) { return p; }

inline Branches<1> given(const GatedResidual& p, const Branches<1>*) {
  return {p, {p.branches[0]}, {p.gates[0]}};
}

template <class T, int kBranches, bool kWeighted, bool kWide>
void launch(const GatedResidual& all, void* stream) {
  const Given<kBranches>& p = given(all, static_cast<Given<kBranches>*>(nullptr));
  const uint32_t rows = checked_rows(p.shape);
  const int64_t vectors = (p.shape.width + kElements<T> - 1) / kElements<T>;
  const uint32_t across = static_cast<uint32_t>(vectors < kThreads ? vectors : kThreads);
  const uint32_t down = kThreads / across;
  const dim3 grid((rows - 1) / down + 1), block(across, down);
  if (all_aligned<T>(all)) {
    FD_LAUNCH((gated_residual_kernel<T, kBranches, true, kWeighted, kWide>), grid, block, stream, p,
              rows);
  } else {
    FD_LAUNCH((gated_residual_kernel<T, kBranches, false, kWeighted, kWide>), grid, block, stream,
              p, rows);
  }
}

// A single branch takes few registers, so more rows are in flight. Weights take some themselves,
// and gates in fp32 twice as many as in 16 bits; of those there is one kernel for several branches,
// weighted or not.
template <class T>
void launch(const GatedResidual& p, void* stream) {
  const bool single = p.count == 1 && !p.weights;
  if constexpr (sizeof(T) < sizeof(float)) {
    if (p.wide && single) return launch<T, 1, false, true>(p, stream);
    if (p.wide) return launch<T, kGroup / 2, true, true>(p, stream);
  }
  if (p.weights) return launch<T, kGroup / 2, true, false>(p, stream);
  single ? launch<T, 1, false, false>(p, stream) : launch<T, kGroup, false, false>(p, stream);
}

}  // namespace

void gated_residual(const GatedResidual& p, const Target& target) {
  if (p.shape.batch * p.shape.tokens * p.shape.width == 0) return;
  launch_on(target, p.dtype, "gated_residual",
            [&](auto zero) { launch<decltype(zero)>(p, target.stream); });
}

}  // namespace cuda
}  // namespace fd
