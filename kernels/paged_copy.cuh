// Blocks between an engine's paged memory and slots: any layout by one table of segments.
//
// Segment s of block b is `sizes[s]` bytes at `bases[s] + b * strides[s]`, and lies in the block's slot at
// `offsets[s]`. Either side may be device memory or mapped host memory. A warp moves tiles of a slot (4 KiB; 1 KiB where
// accesses are narrow): all of a tile's loads are in flight before its first store, which is what keeps a link busy
// that answers after 1 to 2 us.
#pragma once

#include "xxh3.cuh"

namespace forebay {

enum Direction { GATHER, SCATTER, READ };  // paged -> slots, slots -> paged, paged -> nowhere (for its checksums)

constexpr u32 LANES = 32;
constexpr u32 PIECE_BYTES = 16;                          // of one lane, one step
constexpr u32 STEP_BYTES = LANES * PIECE_BYTES;          // of one warp, one step
constexpr u32 STEPS_PER_SUM = SUM_BYTES / STEP_BYTES;

struct Layout {
  const u64* bases;    // (segments)
  const u64* strides;  // (segments), as two's complement
  const u64* offsets;  // (segments + 1), the last one is block_bytes
  u32 segments;
  u32 segment_bytes;  // of every segment, or 0 where they differ
  u32 block_bytes;
};

__device__ inline u32 segment_at(const Layout& layout, u32 position) {
  if (layout.segment_bytes) return position / layout.segment_bytes;
  u32 low = 0, high = layout.segments;  // offsets[low] <= position < offsets[high]
  while (high - low > 1) {
    const u32 middle = (low + high) / 2;
    if (layout.offsets[middle] <= position) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Where a byte of a block lies in the paged memory; positions must not fall between two calls.
struct Cursor {
  const Layout& layout;
  const u64 block_id;
  u32 begin, end;  // of the current segment in the slot
  u32 segment;
  u64 address;  // of the current segment of this block

  __device__ Cursor(const Layout& layout, u64 block_id, u32 position)
      : layout(layout), block_id(block_id), segment(segment_at(layout, position)) {
    enter();
  }

  __device__ void enter() {
    begin = layout.segment_bytes ? segment * layout.segment_bytes : (u32)layout.offsets[segment];
    end = layout.segment_bytes ? begin + layout.segment_bytes : (u32)layout.offsets[segment + 1];
    address = layout.bases[segment] + block_id * layout.strides[segment];
  }

  __device__ u64 at(u32 position) {
    if (position >= end) {
      if (layout.segment_bytes) {
        segment = position / layout.segment_bytes;
      } else {
        do { ++segment; } while (layout.offsets[segment + 1] <= position);
      }
      enter();
    }
    return address + (position - begin);
  }
};

struct alignas(PIECE_BYTES) Piece {
  u64 low, high;
};

// WIDTH: bytes of one access, a power of two that divides every address, offset and size; 16, 4 or 1.
template <int WIDTH>
struct Word;
template <>
struct Word<4> {
  typedef u32 Type;
};
template <>
struct Word<1> {
  typedef u8 Type;
};

__device__ inline Piece load_16(u64 address) {
#ifdef __CUDA_ARCH__
  Piece piece;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u64 {%0, %1}, [%2];"
               : "=l"(piece.low), "=l"(piece.high)
               : "l"(address));
  return piece;
#else
  return *reinterpret_cast<const Piece*>(address);
#endif
}

__device__ inline void store_16(u64 address, Piece piece) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.cs.v2.u64 [%0], {%1, %2};" ::"l"(address), "l"(piece.low), "l"(piece.high) : "memory");
#else
  *reinterpret_cast<Piece*>(address) = piece;
#endif
}

// Bytes `first` to `last - 1` of a piece, at most 8, from wherever `place(i)` says that byte i lies. Not unrolled: such
// accesses are rare, and their code would be most of the module's.
template <int WIDTH, typename Place>
__device__ inline u64 load_words(u32 first, u32 last, Place place) {
  typedef typename Word<WIDTH>::Type Element;
  u64 half = 0;
#pragma unroll 1
  for (u32 i = first; i < last; i += WIDTH)
    half |= (u64) * reinterpret_cast<const Element*>(place(i)) << (8 * (i - first));
  return half;
}

template <int WIDTH, typename Place>
__device__ inline void store_words(u64 half, u32 first, u32 last, Place place) {
  typedef typename Word<WIDTH>::Type Element;
#pragma unroll 1
  for (u32 i = first; i < last; i += WIDTH)
    *reinterpret_cast<Element*>(place(i)) = (Element)(half >> (8 * (i - first)));
}

template <int WIDTH, typename Place>
__device__ inline Piece load_piece(u32 count, Place place) {
  if constexpr (WIDTH == PIECE_BYTES) {
    return load_16(place(0));
  } else {
    const u32 half = count < 8 ? count : 8;
    const u64 low = load_words<WIDTH>(0, half, place);
    return {low, load_words<WIDTH>(8, count, place)};
  }
}

template <int WIDTH, typename Place>
__device__ inline void store_piece(Piece piece, u32 count, Place place) {
  if constexpr (WIDTH == PIECE_BYTES) {
    store_16(place(0), piece);
  } else {
    store_words<WIDTH>(piece.low, 0, count < 8 ? count : 8, place);
    store_words<WIDTH>(piece.high, 8, count, place);
  }
}

// A lane's part of a tile that crosses segments, ends with the block, or has narrow accesses.
template <int DIRECTION, int WIDTH, int STEPS>
__device__ inline void copy_tile(const Layout& layout, u64 block_id, u64 slot, u32 start, Piece* pieces) {
  u32 counts[STEPS];
#pragma unroll
  for (u32 step = 0; step < STEPS; ++step) {
    const u32 position = start + step * STEP_BYTES;
    const u32 left = position < layout.block_bytes ? layout.block_bytes - position : 0;
    counts[step] = left < PIECE_BYTES ? left : PIECE_BYTES;
    pieces[step] = {0, 0};
  }
  if (!counts[0]) return;
  Cursor from(layout, block_id, start);
#pragma unroll
  for (u32 step = 0; step < STEPS; ++step) {
    const u32 position = start + step * STEP_BYTES;
    if (!counts[step]) continue;
    if constexpr (DIRECTION == SCATTER) {
      pieces[step] = load_piece<WIDTH>(counts[step], [&](u32 i) { return slot + position + i; });
    } else {
      pieces[step] = load_piece<WIDTH>(counts[step], [&](u32 i) { return from.at(position + i); });
    }
  }
  if constexpr (DIRECTION != READ) {
    Cursor to(layout, block_id, start);
#pragma unroll
    for (u32 step = 0; step < STEPS; ++step) {
      const u32 position = start + step * STEP_BYTES;
      if (!counts[step]) continue;
      if constexpr (DIRECTION == SCATTER) {
        store_piece<WIDTH>(pieces[step], counts[step], [&](u32 i) { return to.at(position + i); });
      } else {
        store_piece<WIDTH>(pieces[step], counts[step], [&](u32 i) { return slot + position + i; });
      }
    }
  }
}

// Whole warps work. block_ids: (blocks). slots: (blocks), the address of each block's slot. sums, where SUMS:
// (blocks, sums_of(block_bytes), 8).
template <int DIRECTION, int WIDTH, bool SUMS>
__device__ inline void copy_paged(const Layout& layout, const u64* block_ids, const u64* slots, u32 blocks,
                                  u64* sums) {
  constexpr u32 STEPS = WIDTH == PIECE_BYTES ? 8 : 2;
  constexpr u32 TILE_BYTES = STEPS * STEP_BYTES;
  constexpr u32 SUMS_PER_TILE = TILE_BYTES / SUM_BYTES;
  const u32 lane = threadIdx.x % LANES;
  const u32 warps = gridDim.x * (blockDim.x / LANES);
  const u32 tiles = (layout.block_bytes - 1) / TILE_BYTES + 1;
  const u32 place_in_stripe = lane % 4;
  u64 keys[STEPS_PER_SUM][2];
  if constexpr (SUMS) {
    for (u32 step = 0; step < STEPS_PER_SUM; ++step) {
      const u32 stripe = step * (STEP_BYTES / STRIPE_BYTES) + lane / 4;
      for (u32 i = 0; i < 2; ++i) keys[step][i] = secret_word(8 * (stripe + 2 * place_in_stripe + i));
    }
  }
  const u32 first_item = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
  for (u64 item = first_item; item < (u64)blocks * tiles; item += warps) {
    const u32 block = (u32)(item / tiles), tile = (u32)item - block * tiles;
    const u32 begin = tile * TILE_BYTES, start = begin + lane * PIECE_BYTES;
    const u64 slot = DIRECTION == READ ? 0 : slots[block];
    Piece pieces[STEPS];
    Cursor whole(layout, block_ids[block], begin);  // the same in all lanes
    if (WIDTH == PIECE_BYTES && whole.end - begin >= TILE_BYTES) {
      const u64 paged = whole.at(begin) + lane * PIECE_BYTES;
      const u64 source = DIRECTION == SCATTER ? slot + start : paged;
#pragma unroll
      for (u32 step = 0; step < STEPS; ++step) pieces[step] = load_16(source + step * STEP_BYTES);
      if constexpr (DIRECTION != READ) {
        const u64 target = DIRECTION == SCATTER ? paged : slot + start;
#pragma unroll
        for (u32 step = 0; step < STEPS; ++step) store_16(target + step * STEP_BYTES, pieces[step]);
      }
    } else {
      copy_tile<DIRECTION, WIDTH, STEPS>(layout, block_ids[block], slot, start, pieces);
    }
    if constexpr (SUMS) {
      const u32 stripes = summed_stripes(layout.block_bytes), rows = sums_of(layout.block_bytes);
#pragma unroll
      for (u32 row = 0; row < SUMS_PER_TILE; ++row) {
        Pair sum = {0, 0};
#pragma unroll
        for (u32 step = 0; step < STEPS_PER_SUM; ++step) {
          const u32 position = start + (row * STEPS_PER_SUM + step) * STEP_BYTES;
          const Piece piece = pieces[row * STEPS_PER_SUM + step];
          if (position / STRIPE_BYTES < stripes) add_piece(sum, piece.low, piece.high, keys[step][0], keys[step][1]);
        }
        sum = summed_over_stripes(sum);
        const u32 index = tile * SUMS_PER_TILE + row;
        if (lane < 4 && index < rows) {
          u64* out = sums + ((u64)block * rows + index) * 8 + 2 * lane;
          out[0] = sum.even, out[1] = sum.odd;
        }
      }
    }
  }
}

// Checksums of `blocks` blocks from their sums; the last 64 bytes are read from the paged memory. 0 says "not known"
// elsewhere, so a hash of 0 is told as 1. Whole warps work, 8 lanes a block.
__device__ inline void finish_checksums(const Layout& layout, const u64* block_ids, u32 blocks, const u64* sums,
                                        u64* checksums) {
  const u32 thread = blockIdx.x * blockDim.x + threadIdx.x;
  const u32 lane = thread % 8;
  const u32 block = thread / 8 < blocks ? thread / 8 : blocks - 1;  // lanes too many repeat the last one: all shuffle
  const u32 position = layout.block_bytes - STRIPE_BYTES + 8 * lane;
  Cursor cursor(layout, block_ids[block], position);
  u64 word = 0;
  for (u32 i = 0; i < 8; ++i) word |= (u64) * reinterpret_cast<const u8*>(cursor.at(position + i)) << (8 * i);
  const u64 hash = finished(sums + (u64)block * sums_of(layout.block_bytes) * 8, layout.block_bytes, word);
  if (lane == 0 && thread / 8 < blocks) checksums[block] = hash ? hash : 1;
}

}  // namespace forebay
