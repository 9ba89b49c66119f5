// GELU and its derivative on vectors.
//
// Phi(-|y|) = exp(-y^2/2) t P(t) / 2 with t = 1/(1 + p |y|/sqrt(2)). The polynomial P was fitted by us to
// exp(z^2) erfc(z) over z in [0, 9.4], to a relative error of 1.2e-8, so that small values far left have all their
// digits; the form is Hastings' (Abramowitz & Stegun 7.1.26). The density needs the same exponential.

#pragma once

#include "vectors.h"

namespace {

constexpr float kScale = 0.375f * 0.70710678f;
constexpr float kFit[] = {0.21161442f,  0.21063348f, 0.2054306f,   0.12103823f, 0.27484591f,
                          -0.23107909f, 0.43389616f, -0.28807655f, 0.06169686f};

struct Parts {
  Vec below, density;  // Phi(y), and sqrt(2 pi) times the derivative of it
};

inline Parts parts(Vec y) {
  const Vec size = y < 0.0f ? -y : y;
  const Vec density = exp_of_negative(y * y * -0.5f);
  const Vec t = 1.0f / (1.0f + kScale * size);
  Vec p = fill(kFit[8]);
  for (int i = 7; i >= 0; i--) p = p * t + kFit[i];
  const Vec tail = density * p * t * 0.5f;
  return {y < 0.0f ? tail : 1.0f - tail, density};
}

inline Vec value(Vec y) { return y * parts(y).below; }

inline Vec slope(Vec y, const Parts& of) { return of.below + y * of.density * 0.39894228f; }
inline Vec slope(Vec y) { return slope(y, parts(y)); }

}  // namespace
