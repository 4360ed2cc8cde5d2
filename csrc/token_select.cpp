// Compiled once per instruction set (FD_ISA). The metrics of all tokens first, in parallel over the
// tokens; then a sample at a time: the tokens to drop are the head of a partial sort of
// (key, index), which are all different, so there is one answer.
#include "token_select.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace fd {
namespace FD_ISA {
namespace {

// The metric of one token, +infinity where it is not finite.
template <class T>
float metric_of(const TokenSelect& p, int64_t b, int64_t token) {
  const T* patch = static_cast<const T*>(p.velocity) + b * p.stride[0] +
                   token / p.grid[1] * p.stride[1] + token % p.grid[1] * p.stride[2];
  const float channels = float(p.channels);
  float sum = 0;
  for (int64_t y = 0; y < p.patch[0]; ++y) {
    for (int64_t x = 0; x < p.patch[1]; ++x) {
      const T* pixel = patch + y * p.stride[3] + x * p.stride[4];
      float mean = 0, squares = 0;
      if (!p.norm) {
        for (int64_t c = 0; c < p.channels; ++c) mean += to_float(pixel[c * p.stride[5]]);
        mean /= channels;
      }
      for (int64_t c = 0; c < p.channels; ++c) {
        const float deviation = to_float(pixel[c * p.stride[5]]) - mean;
        squares += deviation * deviation;
      }
      if (!p.norm) squares /= std::max(channels - 1, 1.0f);
      sum += std::sqrt(squares);
    }
  }
  return finite_or_infinity(sum / float(p.patch[0] * p.patch[1]));
}

bool forced(const TokenSelect& p, int64_t b, int64_t token) {
  return p.max_age > 0 && p.age.row(b)[token] >= p.max_age;
}

// Marks the `count` tokens with the smallest (key, tie) among those not marked yet.
template <class Key>
void drop(int64_t count, std::vector<uint8_t>& dropped, Key key) {
  if (count == 0) return;
  std::vector<uint64_t> order;  // 32 bits of key, 32 of index, which the key says how to order
  order.reserve(dropped.size());
  for (size_t i = 0; i < dropped.size(); ++i) {
    if (!dropped[i]) order.push_back(key(int64_t(i)));
  }
  std::nth_element(order.begin(), order.begin() + (count - 1), order.end());
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t index = uint32_t(order[i]);
    dropped[index < dropped.size() ? index : ~index] = 1;
  }
}

void one_sample(const TokenSelect& p, const float* metric, int64_t b) {
  const int64_t tokens = p.tokens();
  int32_t* drops = p.drops.row(b);
  const auto key = [&](int64_t i, bool high) {
    const double times = double(p.starvation) * double(drops[i]);
    return uint64_t(drop_key(metric[i], std::exp(high ? -times : times), forced(p, b, i), high))
           << 32;
  };
  std::vector<uint8_t> dropped(tokens, 0);
  // Of equals, the last index first: its complement.
  drop(p.high, dropped, [&](int64_t i) { return key(i, true) | uint32_t(~uint32_t(i)); });
  drop(p.low(), dropped, [&](int64_t i) { return key(i, false) | uint32_t(i); });
  int32_t position = 0;
  for (int64_t i = 0; i < tokens; ++i) {
    const bool gone = dropped[i];
    drops[i] += gone;
    if (p.age) p.age.row(b)[i] = gone ? p.age.row(b)[i] + 1 : 0;
    p.inverse.row(b)[i] = gone ? -1 : position;
    if (!gone) p.rows.row(b)[position++] = int32_t(i);
  }
}

template <class T>
void all_samples(const TokenSelect& p) {
  const int64_t tokens = p.tokens(), count = p.batch * tokens;
  std::vector<float> metric(count);
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.threads > 1)
  for (int64_t i = 0; i < count; ++i) metric[i] = metric_of<T>(p, i / tokens, i % tokens);
#pragma omp parallel for schedule(static) num_threads(p.threads) if (p.threads > 1)
  for (int64_t b = 0; b < p.batch; ++b) one_sample(p, metric.data() + b * tokens, b);
}

}  // namespace

void token_select(const TokenSelect& p) {
  by_dtype(p.dtype, [&p](auto zero) { all_samples<decltype(zero)>(p); });
}

}  // namespace FD_ISA
}  // namespace fd
