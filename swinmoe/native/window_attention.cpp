// Window attention of a whole map, forward and backward, in one pass over it each.
//
// A unit of work is one head of one window. Its queries, keys and values are cut out of the map, multiplied, and put
// where they belong while they are in a core's own cache; its scores are never in memory. The backward pass makes the
// probabilities again from what the forward pass kept of each row, its largest score and the inverse of its sum.
//
// Shapes: B images, H x W map (padded, not shifted), h heads of d, windows of N = wh*ww tokens, L offsets.

#include "vectors.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#if LANES == 16
#define WIDE_ROWS 8     // rows of a tile of three vectors: 24 accumulators of 32 registers
#define NARROW_ROWS 12  // of two vectors, and of one
#else
#define WIDE_ROWS 4  // 12 accumulators of 16 registers
#define NARROW_ROWS 4
#endif

namespace {

constexpr float kNormFloor = 1e-12f;
constexpr int64_t kGathered = 64;  // windows whose bias gradients are summed in single precision
constexpr int64_t kRowBytes = 128 * 1024;  // of the scores that are worked on together

// ------------------------------------------------------------------------------------------------------------ products

// C (rows x NV vectors) = A B, or with `from` + A B. A's elements may lie anywhere; B's and C's rows are contiguous.
template <int ROWS, int NV>
inline void tile(int64_t depth, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row,
                 const float* from, int64_t from_row, float* c, int64_t c_row) {
  Vec acc[ROWS][NV];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) acc[i][j] = from ? load(from + i * from_row + j * LANES) : Vec{};
  for (int64_t p = 0; p < depth; p++) {
    Vec right[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) right[j] = load(b + p * b_row + j * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
      const Vec left = fill(a[i * a_row + p * a_col]);
#pragma GCC unroll 4
      for (int j = 0; j < NV; j++) acc[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) store(c + i * c_row + j * LANES, acc[i][j]);
}

template <int ROWS, int NV>
void strip(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row,
           const float* from, int64_t from_row, float* c, int64_t c_row) {
  int64_t i = 0;
#define TILES(R)                                                                                                      \
  for (; i + R <= rows; i += R)                                                                                       \
  tile<R, NV>(depth, a + i * a_row, a_row, a_col, b, b_row, from ? from + i * from_row : nullptr, from_row,           \
              c + i * c_row, c_row)
  TILES(ROWS);
  TILES(4);
  TILES(2);
  TILES(1);
#undef TILES
}

// C (rows x cols) = A B, or `from` + A B; cols is a multiple of LANES.
void product(int64_t rows, int64_t cols, int64_t depth, const float* a, int64_t a_row, int64_t a_col, const float* b,
             int64_t b_row, const float* from, int64_t from_row, float* c, int64_t c_row) {
  int64_t j = 0;
#define STRIPS(NV, ROWS)                                                                                              \
  for (; j + NV * LANES <= cols; j += NV * LANES)                                                                     \
  strip<ROWS, NV>(rows, depth, a, a_row, a_col, b + j, b_row, from ? from + j : nullptr, from_row, c + j, c_row)
  STRIPS(3, WIDE_ROWS);
  STRIPS(2, NARROW_ROWS);
  STRIPS(1, NARROW_ROWS);
#undef STRIPS
}

// (rows, cols) with rows of `from_row` -> `factor` times (cols, rows) with rows of `to_row`. Block by block, for the
// caches' sake.
void transpose(int64_t rows, int64_t cols, float factor, const float* from, int64_t from_row, float* to,
               int64_t to_row) {
  for (int64_t first = 0; first < rows; first += LANES) {
    const int64_t last = std::min(first + LANES, rows);
    for (int64_t c = 0; c < cols; c++)
      for (int64_t r = first; r < last; r++) to[c * to_row + r] = factor * from[r * from_row + c];
  }
}

// ------------------------------------------------------------------------------------------------------------- a call

struct Call {
  int64_t images, height, width, heads, depth, wh, ww, shift_h, shift_w, offsets, threads, add_to_hidden;
  const float *qkv, *qkv_bias, *bias, *head_scale;  // qkv_bias and head_scale may be null
  const int64_t* index;                             // (N, N) offset of each pair
  const uint8_t* mask;                              // (n, N, N), null = all may attend
  float mask_value;                                 // added to hidden pairs with add_to_hidden, which else get -inf

  int64_t area() const { return wh * ww; }
  int64_t cols() const { return width / ww; }
  int64_t in_image() const { return (height / wh) * cols(); }
  int64_t windows() const { return images * in_image(); }
  int64_t dim() const { return heads * depth; }
  int64_t units() const { return windows() * heads; }
  int64_t block_rows() const {  // scores of so many queries at once, for the cache
    const int64_t fit = kRowBytes / (4 * up(area()));
    return std::min(area(), std::max<int64_t>(NARROW_ROWS * WIDE_ROWS / 4, fit / 24 * 24));
  }
  // Places in the map of a window's tokens, as (image * H + y) * W + x.
  void place(int64_t window, int64_t* tokens) const {
    const int64_t image = window / in_image(), in = window % in_image();
    const int64_t top = in / cols() * wh + shift_h, left = in % cols() * ww + shift_w;
    for (int64_t i = 0; i < wh; i++) {
      const int64_t row = (image * height + (top + i) % height) * width;
      for (int64_t j = 0; j < ww; j++) {
        const int64_t x = left + j;
        *tokens++ = row + (x < width ? x : x - width);
      }
    }
  }
};

// A thread's own memory, all of it vectors' worth, zero where padded.
struct Room {
  int64_t area, wide, deep;  // N, N and d rounded up
  float *q, *k, *v, *slope, *grad_q, *grad_k, *grad_v;  // (N, deep)
  float *k_t, *v_t;                                     // (d, wide)
  float *bias, *bias_grad;                              // (N, wide)
  float *scores, *slopes;                               // (rows of a block, wide)
  float *q_inverse, *k_inverse;                         // (N)
  float* part_sum;                                      // (deep)
  std::vector<int64_t> tokens;

  Room(const Call& call, bool backward) : area(call.area()), wide(up(area)), deep(up(call.depth)), tokens(area) {
    const int64_t flat = area * deep, turned = call.depth * wide, pairs = area * wide, block = call.block_rows() * wide;
    const int64_t both = turned + pairs + block;  // what the backward pass has twice
    const int64_t size = (backward ? 7 * flat + 2 * both : 3 * flat + both) + 2 * area + deep + LANES;
    static thread_local std::vector<float> memory;  // from call to call, or each would touch fresh pages
    if ((int64_t)memory.capacity() > 2 * size + (1 << 20)) std::vector<float>().swap(memory);  // of far larger windows
    memory.assign(size, 0.0f);
    float* at = memory.data();
    at += (LANES - (reinterpret_cast<uintptr_t>(at) / 4) % LANES) % LANES;
    auto take = [&at](int64_t n) { float* got = at; at += n; return got; };
    q = take(flat), k = take(flat), v = take(flat), k_t = take(turned), bias = take(pairs), scores = take(block);
    if (backward) {
      slope = take(flat), grad_q = take(flat), grad_k = take(flat), grad_v = take(flat);
      v_t = take(turned), bias_grad = take(pairs), slopes = take(block);
    }
    q_inverse = take(area), k_inverse = take(area), part_sum = take(deep);
  }
};

// The position bias of a head for every pair; -inf in what pads a row, so that its probability is 0.
void spread_bias(const Call& call, int64_t head, Room& room) {
  const float* of_head = call.bias + head * call.offsets;
  for (int64_t i = 0; i < room.area; i++) {
    for (int64_t j = 0; j < room.area; j++) room.bias[i * room.wide + j] = of_head[call.index[i * room.area + j]];
    for (int64_t j = room.area; j < room.wide; j++) room.bias[i * room.wide + j] = -INFINITY;
  }
}

// One of the three parts (0, 1, 2 of q, k, v) of a unit: (N, d), plus its bias.
void cut(const Call& call, int64_t head, int64_t part, const Room& room, float* to) {
  const int64_t depth = call.depth, at = (part * call.heads + head) * depth;
  const float* bias = call.qkv_bias ? call.qkv_bias + at : nullptr;
  for (int64_t i = 0; i < room.area; i++) {
    const float* from = call.qkv + room.tokens[i] * 3 * call.dim() + at;
    float* row = to + i * room.deep;
    if (depth == room.deep && bias)
      for (int64_t c = 0; c < depth; c += LANES) store(row + c, load(from + c) + load(bias + c));
    else
      for (int64_t c = 0; c < room.deep; c++) row[c] = c >= depth ? 0.0f : bias ? from[c] + bias[c] : from[c];
  }
}

inline float dot(const float* a, const float* b, int64_t n) {
  Vec total = {};
  for (int64_t c = 0; c < n; c += LANES) total += load(a + c) * load(b + c);
  return sum(total);
}

inline void scale_row(float* row, float factor, int64_t n) {
  for (int64_t c = 0; c < n; c += LANES) store(row + c, load(row + c) * factor);
}

// Rows become unit vectors; `inverse`: what they were multiplied by.
void normalise(float* rows, const Room& room, float* inverse) {
  for (int64_t i = 0; i < room.area; i++) {
    float* row = rows + i * room.deep;
    inverse[i] = 1.0f / std::max(std::sqrt(dot(row, row, room.deep)), kNormFloor);
    scale_row(row, inverse[i], room.deep);
  }
}

// What products of queries and keys are multiplied by.
inline float temperature(const Call& call, int64_t head) {
  return call.head_scale ? call.head_scale[head] : 1.0f / std::sqrt((float)call.depth);
}

// Queries, keys and values as they are multiplied, and the keys' transpose times the temperature.
void prepare(const Call& call, int64_t window, int64_t head, Room& room) {
  call.place(window, room.tokens.data());
  cut(call, head, 0, room, room.q);
  cut(call, head, 1, room, room.k);
  cut(call, head, 2, room, room.v);
  if (call.head_scale) {
    normalise(room.q, room, room.q_inverse);
    normalise(room.k, room, room.k_inverse);
  }
  transpose(room.area, call.depth, temperature(call, head), room.k, room.deep, room.k_t, room.wide);
}

// Scores of queries [first, first + rows): bias, mask and products.
void score(const Call& call, int64_t window, int64_t first, int64_t rows, Room& room) {
  const float* added = room.bias + first * room.wide;
  if (call.mask) {
    const uint8_t* allowed = call.mask + (window % call.in_image() * room.area + first) * room.area;
    for (int64_t i = 0; i < rows; i++) {
      float* row = room.scores + i * room.wide;
      const float* of_pairs = added + i * room.wide;
      const uint8_t* may = allowed + i * room.area;
      if (call.add_to_hidden)
        for (int64_t j = 0; j < room.area; j++) row[j] = may[j] ? of_pairs[j] : of_pairs[j] + call.mask_value;
      else
        for (int64_t j = 0; j < room.area; j++) row[j] = may[j] ? of_pairs[j] : -INFINITY;
      for (int64_t j = room.area; j < room.wide; j++) row[j] = -INFINITY;
    }
    added = room.scores;
  }
  product(rows, room.wide, call.depth, room.q + first * room.deep, room.deep, 1, room.k_t, room.wide, added, room.wide,
          room.scores, room.wide);
}

// ------------------------------------------------------------------------------------------------------------- forward

void attend(const Call& call, int64_t window, int64_t head, Room& room, float* out, float* kept) {
  prepare(call, window, head, room);
  const int64_t step = call.block_rows();
  for (int64_t first = 0; first < room.area; first += step) {
    const int64_t rows = std::min(step, room.area - first);
    score(call, window, first, rows, room);
    for (int64_t i = 0; i < rows; i++) {
      float* row = room.scores + i * room.wide;
      Vec most = load(row);
      for (int64_t j = LANES; j < room.wide; j += LANES) {
        const Vec x = load(row + j);
        most = x > most ? x : most;
      }
      const float top = largest(most);
      Vec total = {};
      for (int64_t j = 0; j < room.wide; j += LANES) {
        const Vec e = exp_of_negative(load(row + j) - top);
        store(row + j, e);
        total += e;
      }
      kept[2 * (first + i)] = top;
      kept[2 * (first + i) + 1] = 1.0f / sum(total);
    }
    // The queries of these rows are done with: their memory takes what was attended to, whose padding is 0 as v's is.
    float* attended = room.q + first * room.deep;
    product(rows, room.deep, room.area, room.scores, room.wide, 1, room.v, room.deep, nullptr, 0, attended, room.deep);
    for (int64_t i = 0; i < rows; i++) {
      const float inverse = kept[2 * (first + i) + 1];
      float* to = out + room.tokens[first + i] * call.dim() + head * call.depth;
      const float* from = attended + i * room.deep;
      for (int64_t c = 0; c < call.depth; c++) to[c] = from[c] * inverse;
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ backward

// What a thread sums up over its units: gradients of the position bias, of qkv's bias and of the heads' scales.
struct Sums {
  std::vector<double> bias, qkv_bias, head_scale;  // of many small numbers

  explicit Sums(const Call& call) : bias(call.heads * call.offsets), qkv_bias(3 * call.dim()), head_scale(call.heads) {}
};

// The gradient of a row of q or k, from that of its unit vector, times `factor`. Returns what points along that vector.
inline float back_through_norm(float* grad, const float* unit, float factor, int64_t n) {
  const float along = dot(grad, unit, n);
  for (int64_t c = 0; c < n; c += LANES) store(grad + c, (load(grad + c) - load(unit + c) * along) * factor);
  return along;
}

void put_gradient(const Call& call, int64_t head, int64_t part, const Room& room, const float* from, float* grad,
                  Sums& sums) {
  const int64_t depth = call.depth, at = (part * call.heads + head) * depth;
  float* total = room.part_sum;
  std::fill(total, total + room.deep, 0.0f);
  for (int64_t i = 0; i < room.area; i++) {
    float* to = grad + room.tokens[i] * 3 * call.dim() + at;
    const float* row = from + i * room.deep;
    if (depth == room.deep) {
      for (int64_t c = 0; c < depth; c += LANES) {
        store(to + c, load(row + c));
        store(total + c, load(total + c) + load(row + c));
      }
    } else {
      for (int64_t c = 0; c < depth; c++) to[c] = row[c], total[c] += row[c];
    }
  }
  for (int64_t c = 0; c < depth; c++) sums.qkv_bias[at + c] += total[c];
}

void attend_backward(const Call& call, int64_t window, int64_t head, Room& room, const float* slope, const float* kept,
                     float* grad, Sums& sums) {
  prepare(call, window, head, room);
  transpose(room.area, call.depth, 1.0f, room.v, room.deep, room.v_t, room.wide);
  for (int64_t i = 0; i < room.area; i++)
    std::memcpy(room.slope + i * room.deep, slope + room.tokens[i] * call.dim() + head * call.depth, 4 * call.depth);
  const int64_t step = call.block_rows();
  for (int64_t first = 0; first < room.area; first += step) {
    const int64_t rows = std::min(step, room.area - first);
    const float *q = room.q + first * room.deep, *of_out = room.slope + first * room.deep;
    score(call, window, first, rows, room);
    product(rows, room.wide, call.depth, of_out, room.deep, 1, room.v_t, room.wide, nullptr, 0, room.slopes, room.wide);
    for (int64_t i = 0; i < rows; i++) {
      float *p = room.scores + i * room.wide, *s = room.slopes + i * room.wide;
      const float top = kept[2 * (first + i)], inverse = kept[2 * (first + i) + 1];
      Vec mean = {};
      for (int64_t j = 0; j < room.wide; j += LANES) {
        const Vec probability = exp_of_negative(load(p + j) - top) * inverse;
        store(p + j, probability);
        mean += probability * load(s + j);
      }
      const float centre = sum(mean);
      float* total = room.bias_grad + (first + i) * room.wide;
      for (int64_t j = 0; j < room.wide; j += LANES) {
        const Vec of_score = load(p + j) * (load(s + j) - centre);
        store(s + j, of_score);
        store(total + j, load(total + j) + of_score);
      }
    }
    product(rows, room.deep, room.area, room.slopes, room.wide, 1, room.k, room.deep, nullptr, 0,
            room.grad_q + first * room.deep, room.deep);
    const float *grad_k = first ? room.grad_k : nullptr, *grad_v = first ? room.grad_v : nullptr;
    product(room.area, room.deep, rows, room.slopes, 1, room.wide, q, room.deep, grad_k, room.deep, room.grad_k,
            room.deep);
    product(room.area, room.deep, rows, room.scores, 1, room.wide, of_out, room.deep, grad_v, room.deep, room.grad_v,
            room.deep);
  }
  // So far as if scores were products of q and k alone.
  const float heat = temperature(call, head);
  float along = 0;
  for (int64_t i = 0; i < room.area; i++) {
    const int64_t at = i * room.deep;
    if (call.head_scale) {
      along += back_through_norm(room.grad_q + at, room.q + at, heat * room.q_inverse[i], room.deep);
      back_through_norm(room.grad_k + at, room.k + at, heat * room.k_inverse[i], room.deep);
    } else {
      scale_row(room.grad_q + at, heat, room.deep);
      scale_row(room.grad_k + at, heat, room.deep);
    }
  }
  sums.head_scale[head] += along;
  put_gradient(call, head, 0, room, room.grad_q, grad, sums);
  put_gradient(call, head, 1, room, room.grad_k, grad, sums);
  put_gradient(call, head, 2, room, room.grad_v, grad, sums);
}

// The gradient of a head's position bias: from pairs to offsets.
void gather_bias(const Call& call, int64_t head, Room& room, Sums& sums) {
  double* of_head = sums.bias.data() + head * call.offsets;
  for (int64_t i = 0; i < room.area; i++)
    for (int64_t j = 0; j < room.area; j++) of_head[call.index[i * room.area + j]] += room.bias_grad[i * room.wide + j];
  std::memset(room.bias_grad, 0, 4 * room.area * room.wide);
}

// Units of a head follow each other, so that a thread spreads few heads' biases and seldom gathers.
template <typename Work, typename Begin, typename End>
void in_share(const Call& call, Work work, Begin begin_head, End gather) {
  const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num(), windows = call.windows();
  const int64_t first = call.units() * thread / threads, last = call.units() * (thread + 1) / threads;
  for (int64_t unit = first; unit < last; unit++) {
    const int64_t head = unit / windows, window = unit % windows;
    if (unit == first || window == 0) begin_head(head);
    work(window, head);
    if (unit == last - 1 || window == windows - 1 || window % kGathered == kGathered - 1) gather(head);
  }
}

// `work` on as many threads as have something to do; 0, or 1 if there was no memory for it.
template <typename Work>
int on_threads(const Call& call, Work work) {
  int failed = 0;
#pragma omp parallel num_threads(std::max<int64_t>(1, std::min(call.threads, call.units()))) reduction(| : failed)
  try {
    work();
  } catch (const std::bad_alloc&) {
    failed = 1;
  }
  return failed;
}

}  // namespace

extern "C" {

// out (B, H, W, h*d); kept (windows, h, N, 2): largest score and inverse sum of every row.
int swinmoe_window_attention_forward(const Call* call, float* out, float* kept) {
  return on_threads(*call, [&] {
    Room room(*call, false);
    in_share(
        *call,
        [&](int64_t window, int64_t head) {
          attend(*call, window, head, room, out, kept + (window * call->heads + head) * room.area * 2);
        },
        [&](int64_t head) { spread_bias(*call, head, room); }, [](int64_t) {});
  });
}

// slope: the gradient of out. Writes grad (B, H, W, 3*h*d), grad_qkv_bias (3*h*d), grad_bias (h, L) and
// grad_head_scale (h).
int swinmoe_window_attention_backward(const Call* call, const float* slope, const float* kept, float* grad,
                                      float* grad_qkv_bias, float* grad_bias, float* grad_head_scale) try {
  std::vector<Sums> sums(call->threads, Sums(*call));
  const int failed = on_threads(*call, [&] {
    Room room(*call, true);
    Sums& own = sums[omp_get_thread_num()];
    in_share(
        *call,
        [&](int64_t window, int64_t head) {
          const float* of_unit = kept + (window * call->heads + head) * room.area * 2;
          attend_backward(*call, window, head, room, slope, of_unit, grad, own);
        },
        [&](int64_t head) { spread_bias(*call, head, room); },
        [&](int64_t head) { gather_bias(*call, head, room, own); });
  });
  auto add_up = [&sums](float* to, int64_t size, std::vector<double> Sums::*of) {
    for (int64_t i = 0; i < size; i++) {
      double total = 0;
      for (const Sums& one : sums) total += (one.*of)[i];
      to[i] = (float)total;
    }
  };
  add_up(grad_qkv_bias, 3 * call->dim(), &Sums::qkv_bias);
  add_up(grad_bias, call->heads * call->offsets, &Sums::bias);
  add_up(grad_head_scale, call->heads, &Sums::head_scale);
  return failed;
} catch (const std::bad_alloc&) {
  return 1;
}

}  // extern "C"
