// What the kernels' sources need of CUDA, on one core: the same code, compiled by g++.
//
// A kernel that shuffles runs in real lock step: its warps one after the other, each lane a fiber of its own that yields
// where it shuffles until all 32 lanes have arrived. A kernel that does not is run thread after thread. What a GPU would
// refuse is recorded in `shim::fault`: lanes that part before a shuffle, accesses that are not aligned to their size.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <utility>

#define __device__
#define __host__
#define __global__
#define __constant__
#define __launch_bounds__(...)

struct Dim3 {
  unsigned x, y, z;
};

static Dim3 threadIdx, blockIdx, blockDim, gridDim;

static inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
  return (unsigned long long)(((unsigned __int128)x * y) >> 64);
}

namespace shim {

constexpr unsigned LANES = 32;
constexpr std::size_t STACK_BYTES = 64 << 10;

enum Fault { NONE, LANES_PARTED, MASK_NOT_FULL, MISALIGNED };
static int fault = NONE;

static inline void record(Fault found) {
  if (fault == NONE) fault = found;
}

// One shuffle of a warp. Two are enough: a lane that is at shuffle k + 2 has been woken by all others at k + 1, so all
// of them have read what lay in the slots of k.
struct Exchange {
  std::uint64_t values[LANES];
  unsigned arrived, distance;
};

struct Lane {
  ucontext_t context;
  void* stack;
  unsigned thread, shuffles;
  bool ended;
};

static Lane lanes[LANES];
static Exchange exchanges[2];
static ucontext_t outside, given_up;
static unsigned current;
static bool in_lock_step;
static std::function<void()> body;  // of one thread

// To the next lane that has not ended, and back when it is this one's turn again.
static inline void yield_lane() {
  const unsigned self = current;
  for (unsigned i = 1; i < LANES; ++i) {
    const unsigned next = (self + i) % LANES;
    if (lanes[next].ended) continue;
    current = next;
    threadIdx.x = lanes[next].thread;
    swapcontext(&lanes[self].context, &lanes[next].context);
    return;
  }
  if (lanes[self].ended) setcontext(&outside);
}

static void run_lane() {
  body();
  lanes[current].ended = true;
  yield_lane();
}

static inline void run_warp(unsigned first_thread) {
  exchanges[0].arrived = exchanges[1].arrived = 0;
  for (unsigned i = 0; i < LANES; ++i) {
    Lane& lane = lanes[i];
    if (!lane.stack) lane.stack = std::malloc(STACK_BYTES);
    lane.thread = first_thread + i, lane.shuffles = 0, lane.ended = false;
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack;
    lane.context.uc_stack.ss_size = STACK_BYTES;
    lane.context.uc_link = nullptr;
    makecontext(&lane.context, run_lane, 0);
  }
  current = 0;
  threadIdx.x = first_thread;
  swapcontext(&outside, &lanes[0].context);
  for (const Lane& lane : lanes)
    if (lane.shuffles != lanes[0].shuffles) record(LANES_PARTED);
}

// Every thread of the grid, whose blocks have whole warps; returns the first fault. A misaligned access ends the grid.
static inline int launch(std::function<void()> kernel, bool lock_step, unsigned grid, unsigned threads) {
  fault = NONE;
  body = std::move(kernel), in_lock_step = lock_step;
  gridDim = {grid, 1, 1}, blockDim = {threads, 1, 1};
  getcontext(&given_up);
  if (fault != NONE) return fault;
  for (blockIdx = {0, 0, 0}; blockIdx.x < grid; ++blockIdx.x) {
    for (unsigned thread = 0; thread < threads; thread += lock_step ? LANES : 1) {
      threadIdx = {thread, 0, 0};
      if (lock_step) {
        run_warp(thread);
      } else {
        body();
      }
    }
  }
  return fault;
}

static inline std::uint64_t shuffled(unsigned mask, std::uint64_t value, unsigned distance) {
  if (mask != 0xFFFFFFFFu) record(MASK_NOT_FULL);
  if (!in_lock_step) {
    record(LANES_PARTED);
    return 0;
  }
  const unsigned self = current;
  const unsigned number = lanes[self].shuffles++;
  const unsigned wanted = LANES * (number / 2 + 1);
  Exchange& exchange = exchanges[number % 2];
  if (exchange.arrived % LANES == 0) exchange.distance = distance;
  if (exchange.distance != distance) record(LANES_PARTED);
  exchange.values[self] = value;
  ++exchange.arrived;
  for (unsigned turns = 0; exchange.arrived < wanted; ++turns) {
    if (turns == LANES) {
      record(LANES_PARTED);
      break;
    }
    yield_lane();
  }
  return exchange.values[self ^ distance];
}

}  // namespace shim

static inline unsigned long long __shfl_xor_sync(unsigned mask, unsigned long long value, unsigned distance) {
  return shim::shuffled(mask, value, distance);
}

// Called before a misaligned access by code built with -fsanitize=alignment, in place of its runtime.
extern "C" void __ubsan_handle_type_mismatch_v1(void*, void*) {
  shim::record(shim::MISALIGNED);
  setcontext(&shim::given_up);
}
