// Runs a CUDA kernel's own source on the CPU, for tests: one fiber per thread, one block at a time.
//
// It is made to be hostile. One warp runs as far as it can before the next one starts, and lanes
// and warps start in an order that changes from block to block, so that a missing barrier reads
// what is not there yet. Shared memory begins as NaN. An asynchronous copy lands when it is waited
// for and not before. A misaligned vector, a shuffle or vote that not every lane of a whole warp
// joins, and a barrier that some threads never reach throw std::runtime_error.
//
// It says nothing of speed, of memory ordering between blocks, or of registers.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (::emulation::current().index)
#define blockIdx (::emulation::block().index)
#define blockDim (::emulation::block().size)
#define gridDim (::emulation::block().grid)
#define FD_SHARED(type, name, count) type* name = ::emulation::shared<type>(count)
#define FD_LAUNCH(kernel, grid, block, stream, ...) \
  ::emulation::launch(grid, block, [&] { kernel(__VA_ARGS__); })

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned count() const { return x * y * z; }
};

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;
constexpr size_t kShared = 48 << 10;  // what a block has without asking for more

enum class State { kReady, kAtBarrier, kInWarpOperation, kDone };

struct Copy {
  void* to;
  const void* from;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = State::kReady;
  dim3 index;
  size_t shared = 0;                      // bytes of shared memory declared so far
  void* slot = nullptr;                   // its part in the warp operation it waits for
  const void* operation = nullptr;        // which one that is
  std::vector<std::vector<Copy>> copies;  // asynchronous ones, by group; the last is still open
};

struct Block {
  dim3 index, size, grid;
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  size_t running = 0;
  std::vector<char> shared = std::vector<char>(kShared + 16);
  std::function<void()> body;
  std::function<void(size_t)> complete;  // the warp operation, given its warp
  std::exception_ptr failure;
};

inline Block& block() {
  static thread_local Block b;
  return b;
}

inline Fiber& current() { return block().fibers[block().running]; }

inline void wait(State state) {
  Fiber& self = current();
  self.state = state;
  swapcontext(&self.context, &block().scheduler);
}

inline void run_fiber() {
  try {
    block().body();
  } catch (...) {
    block().failure = std::current_exception();
  }
  wait(State::kDone);
}

// The same address in every thread for the same declaration; filled with NaN when a block starts.
template <class T>
T* shared(size_t count) {
  Fiber& self = current();
  const auto base = (reinterpret_cast<uintptr_t>(block().shared.data()) + 15) & ~uintptr_t{15};
  T* found = reinterpret_cast<T*>(base + self.shared);
  self.shared += (count * sizeof(T) + 15) & ~size_t{15};
  if (self.shared > kShared) throw std::runtime_error("emulation: too much shared memory");
  return found;
}

// Joins a warp operation: the last lane to arrive lets `all` work on the slots of all 32.
template <class Slot, class All>
void with_warp(Slot& slot, All all) {
  static const char operation = 0;  // one for each instance: lanes must agree on it
  Fiber& self = current();
  self.slot = &slot;
  self.operation = &operation;
  block().complete = [all](size_t warp) {
    Slot* slots[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) {
      slots[lane] = static_cast<Slot*>(block().fibers[warp * kWarp + lane].slot);
    }
    all(slots);
  };
  wait(State::kInWarpOperation);
}

inline void start_block(const dim3& index) {
  Block& b = block();
  b.index = index;
  b.failure = nullptr;
  std::memset(b.shared.data(), 0xff, b.shared.size());
  for (unsigned i = 0; i < b.size.count(); ++i) {
    Fiber& f = b.fibers[i];
    f.state = State::kReady;
    f.index = dim3(i % b.size.x, i / b.size.x % b.size.y, i / (b.size.x * b.size.y));
    f.shared = 0;
    f.copies.assign(1, {});
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, run_fiber, 0);
  }
}

// Runs every ready lane of a warp until it waits; true if one ran.
inline bool run_warp(const std::vector<unsigned>& lanes) {
  Block& b = block();
  bool ran = false;
  for (unsigned i : lanes) {
    if (b.fibers[i].state != State::kReady) continue;
    b.running = i;
    ran = true;
    swapcontext(&b.scheduler, &b.fibers[i].context);
    if (b.failure) std::rethrow_exception(b.failure);
  }
  return ran;
}

// Completes the operation that all lanes of a warp wait for; false if not all do.
inline bool complete_operation(size_t warp, size_t lanes) {
  Block& b = block();
  size_t waiting = 0;
  bool same = true;
  for (size_t i = warp * kWarp; i < warp * kWarp + lanes; ++i) {
    waiting += b.fibers[i].state == State::kInWarpOperation;
    same = same && b.fibers[i].operation == b.fibers[warp * kWarp].operation;
  }
  if (waiting == 0 || waiting < lanes) return false;
  if (lanes < kWarp || !same) {
    throw std::runtime_error("emulation: a warp operation without all 32 lanes");
  }
  b.complete(warp);
  for (size_t i = warp * kWarp; i < (warp + 1) * kWarp; ++i) b.fibers[i].state = State::kReady;
  return true;
}

inline bool open_barrier() {
  Block& b = block();
  const unsigned n = b.size.count();
  unsigned waiting = 0, done = 0;
  for (unsigned i = 0; i < n; ++i) {
    waiting += b.fibers[i].state == State::kAtBarrier;
    done += b.fibers[i].state == State::kDone;
  }
  if (done == n) return false;
  if (waiting < n) {
    throw std::runtime_error(
        "emulation: stuck: a barrier or warp operation that not all threads reach");
  }
  for (unsigned i = 0; i < n; ++i) b.fibers[i].state = State::kReady;
  return true;
}

inline void run_block(std::mt19937& random) {
  const size_t threads = block().size.count();
  std::vector<std::vector<unsigned>> warps((threads + kWarp - 1) / kWarp);
  for (unsigned i = 0; i < threads; ++i) warps[i / kWarp].push_back(i);
  std::vector<size_t> order(warps.size());
  for (size_t w = 0; w < warps.size(); ++w) {
    order[w] = w;
    std::shuffle(warps[w].begin(), warps[w].end(), random);
  }
  do {
    std::shuffle(order.begin(), order.end(), random);
    for (size_t w : order) {
      do {
        while (run_warp(warps[w])) {
        }
      } while (complete_operation(w, warps[w].size()));
    }
  } while (open_barrier());
}

inline void launch(const dim3& grid, const dim3& size, std::function<void()> body) {
  if (grid.count() == 0 || size.count() == 0 || size.count() > 1024) {
    throw std::runtime_error("emulation: a launch of no block, or of more than 1024 threads");
  }
  Block& b = block();
  b.grid = grid;
  b.size = size;
  b.body = std::move(body);
  if (b.fibers.size() < size.count()) b.fibers.resize(size.count());
  std::mt19937 random(1);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        start_block(dim3(x, y, z));
        run_block(random);
      }
    }
  }
}

inline void require_multiple_of(size_t size, const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % size != 0) {
    throw std::runtime_error("emulation: a vector access at a misaligned address");
  }
}

}  // namespace emulation

inline void __syncthreads() { ::emulation::wait(::emulation::State::kAtBarrier); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  if (mask != 0xffffffffu) throw std::runtime_error("emulation: a shuffle of part of a warp");
  struct Slot {
    T value;
    int lanes;
    T found;
  } slot = {value, lanes, value};
  ::emulation::with_warp(slot, [](Slot** all) {
    for (int i = 0; i < ::emulation::kWarp; ++i) all[i]->found = all[i ^ all[i]->lanes]->value;
  });
  return slot.found;
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int lanes) {
  if (mask != 0xffffffffu) throw std::runtime_error("emulation: a shuffle of part of a warp");
  struct Slot {
    T value;
    int lanes;
    T found;
  } slot = {value, lanes, value};
  ::emulation::with_warp(slot, [](Slot** all) {
    for (int i = 0; i < ::emulation::kWarp; ++i) {
      if (i >= all[i]->lanes) all[i]->found = all[i - all[i]->lanes]->value;
    }
  });
  return slot.found;
}

inline unsigned __ballot_sync(unsigned mask, bool yes) {
  if (mask != 0xffffffffu) throw std::runtime_error("emulation: a vote of part of a warp");
  struct Slot {
    bool yes;
    unsigned votes;
  } slot = {yes, 0};
  ::emulation::with_warp(slot, [](Slot** all) {
    unsigned votes = 0;
    for (int i = 0; i < ::emulation::kWarp; ++i) votes |= unsigned{all[i]->yes} << i;
    for (int i = 0; i < ::emulation::kWarp; ++i) all[i]->votes = votes;
  });
  return slot.votes;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

// One fiber runs at a time, so nothing comes between.
template <class T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}

inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(double{x})); }
using std::exp;
using std::fmaf;
using std::sqrt;

namespace fd {
namespace cuda {

struct Words;

template <class W = Words>
W load_words(const void* p) {
  ::emulation::require_multiple_of(16, p);
  W w;
  std::memcpy(&w, p, 16);
  return w;
}

template <class W>
void store_words(void* p, const W& w) {
  ::emulation::require_multiple_of(16, p);
  std::memcpy(p, &w, 16);
}

template <class Bytes>
void store_whole(void* p, const Bytes& bytes) {
  ::emulation::require_multiple_of(sizeof(Bytes), p);
  std::memcpy(p, &bytes, sizeof(Bytes));
}

inline void copy_async(void* shared, const void* global) {
  ::emulation::require_multiple_of(16, shared);
  ::emulation::require_multiple_of(16, global);
  ::emulation::current().copies.back().push_back({shared, global});
}

inline void copy_async_commit() { ::emulation::current().copies.push_back({}); }

template <int kPending>
void copy_async_wait() {
  auto& groups = ::emulation::current().copies;
  while (groups.size() > kPending + 1) {
    for (const auto& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
    groups.erase(groups.begin());
  }
}

}  // namespace cuda
}  // namespace fd
