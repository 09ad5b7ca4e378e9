// The kernels by name: {gather,scatter}_{16,4,1}[_xxh3], read_{16,4,1}_xxh3, finish_xxh3. See paged_copy.cuh.
#include "paged_copy.cuh"

#define TABLE                                                                                               \
  const forebay::u64 *bases, const forebay::u64 *strides, const forebay::u64 *offsets, forebay::u32 segments, \
      forebay::u32 segment_bytes, forebay::u32 block_bytes
#define LAYOUT \
  forebay::Layout { bases, strides, offsets, segments, segment_bytes, block_bytes }

// What reads mapped host memory needs more warps to cover the link's latency than what writes it.
#define COPY(name, direction, width, sums_too)                                                                \
  extern "C" __global__ void __launch_bounds__(forebay::direction == forebay::GATHER ? 256 : 512, 1)          \
      name(TABLE, const forebay::u64* block_ids, const forebay::u64* slots, forebay::u32 blocks,              \
           forebay::u64* sums) {                                                                              \
    const forebay::Layout layout = LAYOUT;                                                                    \
    forebay::copy_paged<forebay::direction, width, sums_too>(layout, block_ids, slots, blocks, sums);         \
  }

COPY(gather_16, GATHER, 16, false)
COPY(gather_4, GATHER, 4, false)
COPY(gather_1, GATHER, 1, false)
COPY(scatter_16, SCATTER, 16, false)
COPY(scatter_4, SCATTER, 4, false)
COPY(scatter_1, SCATTER, 1, false)
COPY(gather_16_xxh3, GATHER, 16, true)
COPY(gather_4_xxh3, GATHER, 4, true)
COPY(gather_1_xxh3, GATHER, 1, true)
COPY(scatter_16_xxh3, SCATTER, 16, true)
COPY(scatter_4_xxh3, SCATTER, 4, true)
COPY(scatter_1_xxh3, SCATTER, 1, true)
COPY(read_16_xxh3, READ, 16, true)
COPY(read_4_xxh3, READ, 4, true)
COPY(read_1_xxh3, READ, 1, true)

extern "C" __global__ void __launch_bounds__(32)
    finish_xxh3(TABLE, const forebay::u64* block_ids, forebay::u32 blocks, const forebay::u64* sums,
                forebay::u64* checksums) {
  const forebay::Layout layout = LAYOUT;
  forebay::finish_checksums(layout, block_ids, blocks, sums, checksums);
}
