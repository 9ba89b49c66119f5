// Vectors of the compiler, as wide as the processor's, and exp on them.

#pragma once

#include <cstdint>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

namespace {

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef float Anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline Vec load(const float* from) { return *reinterpret_cast<const Anywhere*>(from); }
inline void store(float* to, Vec x) { *reinterpret_cast<Anywhere*>(to) = x; }
inline Vec fill(float x) { return x - Vec{}; }
inline int64_t up(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// Written past the caches, where nobody reads it before they have been through more than they hold; `to` is aligned.
inline void stream(float* to, Vec x) {
#if defined(__clang__)
  __builtin_nontemporal_store(x, reinterpret_cast<Vec*>(to));
#elif defined(__AVX512F__)
  __builtin_ia32_movntps512(to, x);
#elif defined(__AVX__)
  __builtin_ia32_movntps256(to, x);
#else
  store(to, x);
#endif
}

// Before others may read what was streamed.
inline void finish_streams() {
#if defined(__SSE__)
  __builtin_ia32_sfence();
#endif
}

constexpr int64_t kStreamed = 1 << 21;  // bytes of a map that is streamed: more than a core's own caches hold

// Whether to stream rows of `width` numbers that begin at `at`.
inline bool streams(const float* at, int64_t rows, int64_t width) {
  return reinterpret_cast<uintptr_t>(at) % sizeof(Vec) == 0 && width % LANES == 0 && 4 * rows * width >= kStreamed;
}

// Up to LANES numbers; what is missing is 0.
inline Vec load_some(const float* from, int64_t n) {
  Vec x = {};
  for (int64_t i = 0; i < n; i++) x[i] = from[i];
  return x;
}

inline void store_some(float* to, Vec x, int64_t n) {
  for (int64_t i = 0; i < n; i++) to[i] = x[i];
}

inline float sum(Vec x) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += x[i];
  return total;
}

inline float largest(Vec x) {
  float top = x[0];
  for (int i = 1; i < LANES; i++) top = x[i] > top ? x[i] : top;
  return top;
}

// exp(x) for x <= 0, to about one unit in the last place: x = n ln 2 + r, and a polynomial in r (Cephes' coefficients).
// 0 below -87, where the result would have no exponent left; not a number where x is none.
inline Vec exp_of_negative(Vec x) {
  const Vec lowest = fill(-87.0f), shift = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to integers
  const Vec held = x < lowest ? lowest : x;
  const Vec shifted = held * 1.44269504f + shift, n = shifted - shift;
  const Vec r = (held - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = fill(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const Vec y = p * (r * r) + r + 1.0f;
  const Vec scaled = (Vec)((Ints)y + ((Ints)shifted << 23));
  return x >= lowest ? scaled : held * 0.0f;
}

}  // namespace
