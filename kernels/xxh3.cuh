// XXH3-64 of one block, cut so that many threads compute it while they copy.
//
// Within 1 KiB the accumulation of XXH3 is a sum, in any order: each warp sums the tiles it copies (`tile_sum`), and
// `finish` chains the sums of a block's tiles, 8 lanes a block. The value is the one of every XXH3 library.
// Source of the algorithm: the xxHash specification, XXH3 for inputs of more than 240 bytes, seed 0, default secret.
#pragma once

namespace forebay {

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 STRIPE_BYTES = 64;
constexpr u32 SUM_BYTES = 1024;  // 16 stripes: what is summed between two scrambles
constexpr u32 SECRET_BYTES = 192;

constexpr u64 PRIME32_1 = 0x9E3779B1ULL;
constexpr u64 PRIME32_2 = 0x85EBCA77ULL;
constexpr u64 PRIME32_3 = 0xC2B2AE3DULL;
constexpr u64 PRIME64_1 = 0x9E3779B185EBCA87ULL;
constexpr u64 PRIME64_2 = 0xC2B2AE3D27D4EB4FULL;
constexpr u64 PRIME64_3 = 0x165667B19E3779F9ULL;
constexpr u64 PRIME64_4 = 0x85EBCA77C2B2AE63ULL;
constexpr u64 PRIME64_5 = 0x27D4EB2F165667C5ULL;
constexpr u64 AVALANCHE = 0x165667919E3779F9ULL;

__constant__ const u8 SECRET[SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

__device__ inline u64 secret_word(u32 offset) {
  u64 word = 0;
  for (u32 i = 0; i < 8; ++i) word |= (u64)SECRET[offset + i] << (8 * i);
  return word;
}

// The product that XXH3 adds for one word of a stripe.
__device__ inline u64 mixed(u64 word, u64 key) {
  const u64 x = word ^ key;
  return (x & 0xFFFFFFFFULL) * (x >> 32);
}

__device__ inline u64 scrambled(u64 acc, u64 key) { return ((acc ^ (acc >> 47)) ^ key) * PRIME32_1; }

__device__ inline u64 multiplied_folded(u64 x, u64 y) { return x * y ^ __umul64hi(x, y); }

__device__ inline u64 avalanched(u64 hash) {
  hash = (hash ^ (hash >> 37)) * AVALANCHE;
  return hash ^ (hash >> 32);
}

__device__ inline u64 initial_accumulator(u32 lane) {
  const u64 values[8] = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
  u64 value = 0;
  for (u32 i = 0; i < 8; ++i) value = lane == i ? values[i] : value;
  return value;
}

// How many stripes of a block are summed; the last 64 bytes of the block are one more, with a key of their own.
__device__ inline u32 summed_stripes(u32 block_bytes) { return (block_bytes - 1) / STRIPE_BYTES; }

// How many sums a block has, 8 words each; no scramble follows the last.
__host__ __device__ inline u32 sums_of(u32 block_bytes) { return (block_bytes - 1) / SUM_BYTES + 1; }

// Sums of the accumulators 2 j and 2 j + 1, where j is the place of 16 bytes in their stripe.
struct Pair {
  u64 even, odd;
};

__device__ inline void add_piece(Pair& sum, u64 even, u64 odd, u64 even_key, u64 odd_key) {
  sum.even += mixed(even, even_key) + odd;
  sum.odd += mixed(odd, odd_key) + even;
}

// The sum over the lanes of a warp with an equal place in the stripe (lane % 4).
__device__ inline Pair summed_over_stripes(Pair sum) {
  for (u32 distance = 4; distance < 32; distance *= 2) {
    sum.even += __shfl_xor_sync(0xFFFFFFFFu, sum.even, distance);
    sum.odd += __shfl_xor_sync(0xFFFFFFFFu, sum.odd, distance);
  }
  return sum;
}

// XXH3-64 from a block's sums. Called by whole warps; lane % 8 is the accumulator, the same block in all 8 lanes.
//   sums: u64 (sums, 8). last_word: word `lane % 8` of the block's last 64 bytes. Returns the hash in every lane.
__device__ inline u64 finished(const u64* sums, u32 block_bytes, u64 last_word) {
  constexpr u32 AHEAD = 8;  // sums read before they are needed: the chain below waits for each
  const u32 lane = threadIdx.x % 8;
  const u32 scrambles = sums_of(block_bytes) - 1;
  const u64 key = secret_word(SECRET_BYTES - STRIPE_BYTES + 8 * lane);
  u64 acc = initial_accumulator(lane);
  u64 next[AHEAD];
  for (u32 i = 0; i < AHEAD; ++i) next[i] = i <= scrambles ? sums[i * 8 + lane] : 0;
  for (u32 first = 0; first <= scrambles; first += AHEAD) {
    u64 now[AHEAD];
#pragma unroll
    for (u32 i = 0; i < AHEAD; ++i) {
      now[i] = next[i];
      const u32 later = first + AHEAD + i;
      next[i] = later <= scrambles ? sums[(u64)later * 8 + lane] : 0;
    }
#pragma unroll
    for (u32 i = 0; i < AHEAD; ++i) {
      if (first + i > scrambles) break;
      acc += now[i];
      if (first + i < scrambles) acc = scrambled(acc, key);
    }
  }
  const u64 neighbour = __shfl_xor_sync(0xFFFFFFFFu, last_word, 1);
  acc += mixed(last_word, secret_word(SECRET_BYTES - STRIPE_BYTES - 7 + 8 * lane)) + neighbour;
  const u64 keyed = acc ^ secret_word(11 + 8 * lane);
  u64 merged = multiplied_folded(keyed, __shfl_xor_sync(0xFFFFFFFFu, keyed, 1));
  merged += __shfl_xor_sync(0xFFFFFFFFu, merged, 2);
  merged += __shfl_xor_sync(0xFFFFFFFFu, merged, 4);
  return avalanched(merged + (u64)block_bytes * PRIME64_1);
}

}  // namespace forebay
