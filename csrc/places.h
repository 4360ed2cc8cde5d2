// Where tokens of several sizes lie on a grid of cells; fastdit/ops/patchify.py says it in full.
#pragma once
#include "element.h"

namespace fd {

// A square of 2^level x 2^level cells, by its first one.
struct Place {
  int32_t level;
  int32_t y;
  int32_t x;

  FD_HD int64_t side() const { return int64_t{1} << level; }
};

// int32 [B, n, 3]; the last stride is 1, and that of the batch is 0 where one serves all.
struct Places {
  int32_t* data = nullptr;
  int64_t batch_stride = 0;
  int64_t token_stride = 0;

  FD_HD Place at(int64_t batch, int64_t token) const {
    const int32_t* of = data + batch * batch_stride + token * token_stride;
    return {of[0], of[1], of[2]};
  }

  FD_HD void set(int64_t batch, int64_t token, const Place& place) const {
    int32_t* of = data + batch * batch_stride + token * token_stride;
    of[0] = place.level;
    of[1] = place.y;
    of[2] = place.x;
  }
};

}  // namespace fd
