// gelu(x + bias) = y Phi(y) with y = x + bias, exact, and its backward pass: one walk over memory each.
//
// Shapes: n rows of width F; bias (F,).

#include "gelu.h"
#include "vectors.h"

#include <omp.h>

#include <algorithm>
#include <new>
#include <vector>

namespace {

constexpr int64_t kTogether = 256;  // rows, at most, that are summed in single precision

}  // namespace

extern "C" {

int swinmoe_biased_gelu_forward(int64_t rows, int64_t width, int64_t threads, const float* x, const float* bias,
                                 float* out) {
  const int64_t whole = width / LANES * LANES;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; i++) {
    const float* from = x + i * width;
    float* to = out + i * width;
    for (int64_t j = 0; j < whole; j += LANES) store(to + j, value(load(from + j) + load(bias + j)));
    if (const int64_t rest = width - whole)
      store_some(to + whole, value(load_some(from + whole, rest) + load_some(bias + whole, rest)), rest);
  }
  return 0;
}

// grad_x (rows, width), grad_bias (width): the sum of grad_x over rows. 0, or 1 if there was no memory for it.
int swinmoe_biased_gelu_backward(int64_t rows, int64_t width, int64_t threads, const float* grad, const float* x,
                                 const float* bias, float* grad_x, float* grad_bias) try {
  const int64_t whole = width / LANES * LANES, rest = width - whole;
  // As many for each thread.
  const int64_t blocks = threads * ((rows + threads * kTogether - 1) / (threads * kTogether));
  std::vector<std::vector<double>> sums(threads, std::vector<double>(width));
  std::vector<std::vector<float>> of_blocks(threads, std::vector<float>(whole + LANES));
#pragma omp parallel num_threads(threads)
  {
    float* own = of_blocks[omp_get_thread_num()].data();
    double* total = sums[omp_get_thread_num()].data();
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
      std::fill(own, own + whole + LANES, 0.0f);
      for (int64_t i = rows * block / blocks; i < rows * (block + 1) / blocks; i++) {
        const int64_t at = i * width;
        for (int64_t j = 0; j < whole; j += LANES) {
          const Vec of_x = load(grad + at + j) * slope(load(x + at + j) + load(bias + j));
          store(grad_x + at + j, of_x);
          store(own + j, load(own + j) + of_x);
        }
        if (rest) {
          const Vec y = load_some(x + at + whole, rest) + load_some(bias + whole, rest);
          const Vec of_x = load_some(grad + at + whole, rest) * slope(y);
          store_some(grad_x + at + whole, of_x, rest);
          store(own + whole, load(own + whole) + of_x);
        }
      }
      for (int64_t j = 0; j < width; j++) total[j] += own[j];
    }
  }
  for (int64_t j = 0; j < width; j++) {
    double total = 0;
    for (const auto& one : sums) total += one[j];
    grad_bias[j] = (float)total;
  }
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

}  // extern "C"
