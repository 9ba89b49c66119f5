// Tokens to rows and back: what lies between a router and experts, each in one walk over memory.
//
// Shapes: T tokens, K choices each, E experts, M rows, D width. Choices are counted t K + k.

#include "vectors.h"

#include <algorithm>
#include <atomic>

namespace {

constexpr int kTogether = 4;  // vectors
constexpr int kAhead = 2;  // rows that are asked for before their turn: they lie anywhere

inline void ask(const float* row, int64_t dim) {
  for (int64_t j = 0; j < std::min<int64_t>(dim, 8 * LANES); j += 16) __builtin_prefetch(row + j);
}

// to = weight from, streamed or not; or += of it.
inline void put(float* to, const float* from, float weight, int64_t dim, bool add, bool streamed) {
  const Vec by = fill(weight);
  int64_t j = 0;
  for (; j + LANES <= dim; j += LANES) {
    const Vec x = load(from + j) * by;
    if (streamed)
      stream(to + j, x);
    else
      store(to + j, add ? load(to + j) + x : x);
  }
  for (; j < dim; j++) to[j] = add ? to[j] + weight * from[j] : weight * from[j];
}

// to = weight from, and the product of `from` and `row`.
inline float put_and_multiply(float* to, const float* from, const float* row, float weight, int64_t dim,
                              bool streamed) {
  const Vec by = fill(weight);
  Vec sums[2] = {};
  int64_t j = 0;
  for (int v = 0; j + LANES <= dim; j += LANES, v ^= 1) {
    const Vec x = load(from + j);
    sums[v] += x * load(row + j);
    if (to) streamed ? stream(to + j, x * by) : store(to + j, x * by);
  }
  float total = sum(sums[0] + sums[1]);
  for (; j < dim; j++) {
    total += from[j] * row[j];
    if (to) to[j] = weight * from[j];
  }
  return total;
}

inline bool within(int64_t i, int64_t n) { return 0 <= i && i < n; }

constexpr int kOutside = 2;  // an index is none

}  // namespace

extern "C" {

// slot (T, K): each choice's place in its expert's queue, first choices of all tokens before second ones, tokens in the
// order of `turn` (T,) or, if that is null, their own; length (E,), zeros before, of each queue.
int swinmoe_line_up(int64_t tokens, int64_t choices, int64_t experts, const int64_t* ids, const int64_t* turn,
                    int64_t* slot, int64_t* length) {
  for (int64_t k = 0; k < choices; k++)
    for (int64_t i = 0; i < tokens; i++) {
      const int64_t t = turn ? turn[i] : i;
      if (!within(t, tokens)) return kOutside;
      const int64_t at = t * choices + k, e = ids[at];
      if (!within(e, experts)) return kOutside;
      slot[at] = length[e]++;
    }
  return 0;
}

// row (M,): the choice in each row, -1 in those without; position (T K,): the row of each choice, 0 where it was
// dropped. first (E,): each expert's first row.
int swinmoe_give_rows(int64_t all, int64_t experts, int64_t rows, const int64_t* ids, const int64_t* slot,
                      const bool* kept, const int64_t* first, int64_t* row, int64_t* position) {
  std::fill(row, row + rows, -1);
  for (int64_t i = 0; i < all; i++) {
    position[i] = 0;
    if (kept && !kept[i]) continue;
    if (!within(ids[i], experts)) return kOutside;
    const int64_t at = first[ids[i]] + slot[i];
    if (!within(at, rows)) return kOutside;
    row[at] = i;
    position[i] = at;
  }
  return 0;
}

// out (M, D): the token of each row, zeros in rows without.
int swinmoe_take_rows(int64_t tokens, int64_t choices, int64_t rows, int64_t dim, int64_t threads, const int64_t* row,
                      const float* x, float* out) {
  std::atomic<int> status{0};
  const bool streamed = streams(out, rows, dim);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t m = 0; m < rows; m++) {
      if (m + kAhead < rows && within(row[m + kAhead], tokens * choices)) ask(x + row[m + kAhead] / choices * dim, dim);
      if (row[m] < 0)
        std::fill(out + m * dim, out + (m + 1) * dim, 0.0f);
      else if (row[m] < tokens * choices)
        put(out + m * dim, x + row[m] / choices * dim, 1.0f, dim, false, streamed);
      else
        status = kOutside;
    }
    finish_streams();
  }
  return status;
}

// out (T, D): the sum of each token's kept choices' rows, each times its weight; weights (T K,) are 1 if null.
int swinmoe_sum_choices(int64_t tokens, int64_t choices, int64_t rows, int64_t dim, int64_t threads,
                        const int64_t* position, const bool* kept, const float* weights, const float* from,
                        float* out) {
  std::atomic<int> status{0};
  const int64_t all = tokens * choices;
  const bool streamed = choices == 1 && streams(out, tokens, dim);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t t = 0; t < tokens; t++) {
      bool any = false;
      for (int64_t i = t * choices; i < (t + 1) * choices; i++) {
        const int64_t soon = i + kAhead * choices;
        if (soon < all && within(position[soon], rows)) ask(from + position[soon] * dim, dim);
        if (kept && !kept[i]) continue;
        if (!within(position[i], rows)) {
          status = kOutside;
          continue;
        }
        put(out + t * dim, from + position[i] * dim, weights ? weights[i] : 1.0f, dim, any, streamed);
        any = true;
      }
      if (!any) std::fill(out + t * dim, out + (t + 1) * dim, 0.0f);
    }
    finish_streams();
  }
  return status;
}

// Of the gradients (T, D) of such sums: those of rows (M, D), zeros in rows without a choice, and those of weights
// (T K,), 0 where a choice was dropped. Each of them may be null: nobody wants it.
int swinmoe_sum_choices_backward(int64_t tokens, int64_t choices, int64_t rows, int64_t dim, int64_t threads,
                                 const int64_t* position, const bool* kept, const int64_t* row, const float* weights,
                                 const float* grad, const float* from, float* grad_rows, float* grad_weights) {
  std::atomic<int> status{0};
  const int64_t all = tokens * choices;
  const bool streamed = grad_rows && streams(grad_rows, rows, dim);
#pragma omp parallel num_threads(threads)
  {
    if (grad_rows) {
#pragma omp for nowait
      for (int64_t m = 0; m < rows; m++)
        if (row[m] < 0) std::fill(grad_rows + m * dim, grad_rows + (m + 1) * dim, 0.0f);
    }
#pragma omp for
    for (int64_t i = 0; i < all; i++) {
      const int64_t soon = i + kAhead;
      if (grad_weights && soon < all && within(position[soon], rows)) ask(from + position[soon] * dim, dim);
      if (kept && !kept[i]) {
        if (grad_weights) grad_weights[i] = 0;
        continue;
      }
      if (!within(position[i], rows)) {
        status = kOutside;
        continue;
      }
      const float* own = grad + i / choices * dim;
      float* to = grad_rows ? grad_rows + position[i] * dim : nullptr;
      if (grad_weights)
        grad_weights[i] = put_and_multiply(to, own, from + position[i] * dim, weights[i], dim, streamed);
      else if (to)
        put(to, own, weights[i], dim, false, streamed);
    }
    finish_streams();
  }
  return status;
}

// out (T, D) = x (T, D) + factors (T, E) weight (E, D).
int swinmoe_add_product(int64_t tokens, int64_t few, int64_t dim, int64_t threads, const float* x, const float* factors,
                        const float* weight, float* out) {
  const bool streamed = streams(out, tokens, dim);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t t = 0; t < tokens; t++) {
      const float *own = x + t * dim, *by = factors + t * few;
      float* to = out + t * dim;
      int64_t j = 0;
      for (; j + kTogether * LANES <= dim; j += kTogether * LANES) {
        Vec sums[kTogether];
#pragma GCC unroll 8
        for (int v = 0; v < kTogether; v++) sums[v] = load(own + j + v * LANES);
        for (int64_t e = 0; e < few; e++) {
          const Vec factor = fill(by[e]);
#pragma GCC unroll 8
          for (int v = 0; v < kTogether; v++) sums[v] += factor * load(weight + e * dim + j + v * LANES);
        }
        for (int v = 0; v < kTogether; v++)
          streamed ? stream(to + j + v * LANES, sums[v]) : store(to + j + v * LANES, sums[v]);
      }
      for (; j + LANES <= dim; j += LANES) {
        Vec sums = load(own + j);
        for (int64_t e = 0; e < few; e++) sums += fill(by[e]) * load(weight + e * dim + j);
        streamed ? stream(to + j, sums) : store(to + j, sums);
      }
      for (; j < dim; j++) {
        float total = own[j];
        for (int64_t e = 0; e < few; e++) total += by[e] * weight[e * dim + j];
        to[j] = total;
      }
    }
    finish_streams();
  }
  return 0;
}

}  // extern "C"
