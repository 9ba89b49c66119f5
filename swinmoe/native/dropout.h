// Dropout by counting: whether a unit stays follows from a seed, its row and its column alone, so that no mask is kept,
// and threads, tiles and the backward pass agree on it.

#pragma once

#include "vectors.h"

namespace {

typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

struct Dropout {
  uint64_t seed;
  uint32_t dropped;  // of 2^32 units; 0 is none
  float scale;       // of those that stay

  // 64 bits of a row: splitmix64 (Steele, Lea and Flood 2014), whose n-th output it is.
  uint64_t key(int64_t row) const {
    uint64_t z = seed + (uint64_t)(row + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }

  // `scale` for units that stay and 0 for others, of columns `column` to `column` + LANES: a multiplicative hash of the
  // column (Wellons' lowbias32), into which half of the key goes before each of its multiplications.
  Vec factors(uint64_t key, int64_t column) const {
    Words x;
    for (int i = 0; i < LANES; i++) x[i] = (uint32_t)i;
    x = (x + (uint32_t)column) ^ (uint32_t)key;
    x = (x ^ x >> 16) * 0x7feb352du;
    x = ((x ^ x >> 15) + (uint32_t)(key >> 32)) * 0x846ca68bu;
    x ^= x >> 16;
    return x >= dropped ? fill(scale) : Vec{};
  }
};

}  // namespace
