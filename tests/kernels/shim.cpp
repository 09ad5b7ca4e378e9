// The kernels' translation unit compiled by g++, each kernel a plain function, and two calls that start one over a grid.
#include "cpu_shim.h"

#include "paged_copy.cu"

using forebay::u32;
using forebay::u64;

typedef void (*Copy)(const u64*, const u64*, const u64*, u32, u32, u32, const u64*, const u64*, u32, u64*);
typedef void (*Finish)(const u64*, const u64*, const u64*, u32, u32, u32, const u64*, u32, const u64*, u64*);

// Both return a shim::Fault.
extern "C" int launch_copy(Copy kernel, int lock_step, u32 grid, u32 threads, const u64* bases, const u64* strides,
                           const u64* offsets, u32 segments, u32 segment_bytes, u32 block_bytes, const u64* block_ids,
                           const u64* slots, u32 blocks, u64* sums) {
  const auto thread = [=] {
    kernel(bases, strides, offsets, segments, segment_bytes, block_bytes, block_ids, slots, blocks, sums);
  };
  return shim::launch(thread, lock_step, grid, threads);
}

extern "C" int launch_finish(Finish kernel, int lock_step, u32 grid, u32 threads, const u64* bases, const u64* strides,
                             const u64* offsets, u32 segments, u32 segment_bytes, u32 block_bytes,
                             const u64* block_ids, u32 blocks, const u64* sums, u64* checksums) {
  const auto thread = [=] {
    kernel(bases, strides, offsets, segments, segment_bytes, block_bytes, block_ids, blocks, sums, checksums);
  };
  return shim::launch(thread, lock_step, grid, threads);
}
