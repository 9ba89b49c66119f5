// Experts' MLPs, fc2_e(dropout(activation(fc1_e(row)))) for the rows of every expert e, forward and backward.
//
// Weights of many experts and their gradients are most of what such a layer moves through memory. Here a panel of
// weights is fetched and packed while the one before is multiplied, bias and activation are done on a tile while it is
// in the cache, hidden units live for one expert at a time, and weight gradients are written where they belong.
//
// Shapes: N rows, S sources and e experts here (rows are ordered so), D width, F hidden width. Matrices are row by row:
// fc1 (e, F, D), b1 (e, F), fc2 (e, D, F), b2 (e, D). Pre-activations lie in chunks of rows (*, F).

#include "dropout.h"
#include "gelu.h"
#include "vectors.h"

#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

#if LANES == 16
constexpr int kDown = 14;  // rows of a tile of two vectors: 28 accumulators of 32 registers
#else
constexpr int kDown = 6;  // 12 accumulators of 16 registers
#endif
constexpr int kAcross = 2 * LANES;  // columns of a tile, and of a panel
constexpr int kUnrolled = 8;
constexpr int kPanelAhead = 8;   // rows of a panel that are asked for before their turn
constexpr int kStripAhead = 64;  // and of a strip
constexpr int64_t kRowsOfUnit = 768;    // that are worked on together: what belongs to them stays in a core's cache
constexpr int64_t kRowsSummed = 256;    // at most, in single precision, of biases' gradients
constexpr int64_t kPanelsOfThread = 4;  // at least, in a wave, so that threads have as much to do

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ------------------------------------------------------------------------------------------------------------ products

// Memory that is asked for before it is needed: a panel's width from each of `rows` rows, which lie `step` bytes apart,
// and again as much to the right of it, `times` times in all.
struct Ahead {
  const char* begin = nullptr;
  int64_t step = 0, rows = 0, times = 0;
  int64_t row = 0;

  // Whether there was any left to ask for.
  template <bool WRITTEN>
  inline bool fetch() {
    if (times <= 0) return false;
    const char* at = begin + row * step;
    __builtin_prefetch(at, WRITTEN, WRITTEN ? 3 : 2);
    __builtin_prefetch(at + 4 * kAcross - 4, WRITTEN, WRITTEN ? 3 : 2);
    if (++row == rows) {
      row = 0;
      begin += 4 * kAcross;
      times--;
    }
    return true;
  }
};

inline Ahead rows_of(const float* at, int64_t stride, int64_t rows) { return {(const char*)at, 4 * stride, rows, 1}; }

// What a product fetches on its way: where its tile is to be read and written, and what comes next of the weights.
struct Fetched {
  Ahead written{}, then_written{}, read{}, weights{};

  inline void fetch() {
    if (!written.fetch<true>()) then_written.fetch<true>();
    if (!read.fetch<false>()) weights.fetch<false>();
  }
};

// One step of a product of ROWS rows: a number of each, `apart` from each other, times two vectors.
template <int ROWS>
inline __attribute__((always_inline)) void step(Vec (&acc)[ROWS][2], const float* a, int64_t apart, const float* b) {
  const Vec left = load(b), right = load(b + LANES);
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++) {
    const Vec x = fill(a[i * apart]);
    acc[i][0] += x * left;
    acc[i][1] += x * right;
  }
}

template <int ROWS>
inline void put_tile(const Vec (&acc)[ROWS][2], float* out) {
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++) {
    store(out + i * kAcross, acc[i][0]);
    store(out + i * kAcross + LANES, acc[i][1]);
  }
}

// out (ROWS, kAcross) = the rows of a strip (depth, kDown) times a panel (depth, kAcross).
template <int ROWS>
void product(int64_t depth, const float* strip, const float* panel, float* out, const Fetched& fetched) {
  Vec acc[ROWS][2] = {};
  Fetched own = fetched;
  const auto one = [&](int64_t p) __attribute__((always_inline)) {
    // Long panels, which other tiles have pushed out of the first cache.
    for (int v = 0; v < 2; v++) __builtin_prefetch(panel + (p + kPanelAhead) * kAcross + v * LANES, 0, 3);
    __builtin_prefetch(strip + (p + kStripAhead) * kDown, 0, 3);
    step<ROWS>(acc, strip + p * kDown, 1, panel + p * kAcross);
  };
  int64_t p = 0;
  for (; p + kUnrolled <= depth; p += kUnrolled) {
    own.fetch();
#pragma GCC unroll 8
    for (int u = 0; u < kUnrolled; u++) one(p + u);
  }
  for (; p < depth; p++) one(p);
  put_tile<ROWS>(acc, out);
}

// out (ROWS, kAcross) = ROWS columns of strips, over all rows, times a panel (rows of all strips, kAcross).
template <int ROWS>
void product_over_rows(const std::vector<int64_t>& heights, const float* strip, int64_t apart, const float* panel,
                       float* out, const Fetched& fetched) {
  Vec acc[ROWS][2] = {};
  Fetched own = fetched;
  for (const int64_t height : heights) {
    own.fetch();
    own.fetch();
    const auto one = [&](int64_t r) __attribute__((always_inline)) {
      for (int v = 0; v < 2; v++) __builtin_prefetch(panel + (r + kPanelAhead) * kAcross + v * LANES, 0, 3);
      __builtin_prefetch(strip + apart + r * kDown, 0, 3);
      step<ROWS>(acc, strip + r, kDown, panel + r * kAcross);
    };
#pragma GCC unroll 4
    for (int64_t r = 0; r < height; r++) one(r);
    strip += apart;
    panel += height * kAcross;
  }
  put_tile<ROWS>(acc, out);
}

template <int... I>
inline void multiply(int64_t rows, std::integer_sequence<int, I...>, int64_t depth, const float* strip,
                     const float* panel, float* out, const Fetched& fetched) {
  static constexpr decltype(&product<1>) all[] = {product<I + 1>...};
  all[rows - 1](depth, strip, panel, out, fetched);
}

template <int... I>
inline void multiply_over_rows(int64_t columns, std::integer_sequence<int, I...>, const std::vector<int64_t>& heights,
                               const float* strip, int64_t apart, const float* panel, float* out,
                               const Fetched& fetched) {
  static constexpr decltype(&product_over_rows<1>) all[] = {product_over_rows<I + 1>...};
  all[columns - 1](heights, strip, apart, panel, out, fetched);
}

constexpr auto kHeights = std::make_integer_sequence<int, kDown>();

// n numbers of a tile's row go to `to`, streamed or not; or are added to what is there.
inline void put(float* to, const float* row, int64_t n, bool add, bool streamed = false) {
  if (streamed) {
    for (int64_t j = 0; j < n; j += LANES) stream(to + j, load(row + j));
    return;
  }
  for (int64_t j = 0; j < n; j += LANES) {
    const int64_t some = std::min<int64_t>(LANES, n - j);
    const Vec x = load(row + j);
    if (some == LANES)
      store(to + j, add ? load(to + j) + x : x);
    else
      store_some(to + j, add ? load_some(to + j, some) + x : x, some);
  }
}

inline Vec load_up_to(const float* from, int64_t n) {
  return n >= LANES ? load(from) : load_some(from, std::max<int64_t>(0, n));
}

// ------------------------------------------------------------------------------------------------------------- packing

#if defined(__clang__)
template <int D, bool HIGH, int... J>
inline Vec blend(Vec a, Vec b, std::integer_sequence<int, J...>) {
  return __builtin_shufflevector(a, b, (J & D ? LANES + J - (HIGH ? 0 : D) : J + (HIGH ? D : 0))...);
}
#else
template <int D, bool HIGH, int... J>
inline Vec blend(Vec a, Vec b, std::integer_sequence<int, J...>) {
  return __builtin_shuffle(a, b, Ints{(J & D ? LANES + J - (HIGH ? 0 : D) : J + (HIGH ? D : 0))...});
}
#endif

// A square of LANES x LANES numbers, by exchanging what lies D rows and columns apart, for D = 1, 2, 4, ...
template <int D>
inline __attribute__((always_inline)) void transpose(Vec* rows) {
  constexpr auto lanes = std::make_integer_sequence<int, LANES>();
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++)
    if (!(i & D)) {
      const Vec a = rows[i], b = rows[i + D];
      rows[i] = blend<D, false>(a, b, lanes);
      rows[i + D] = blend<D, true>(a, b, lanes);
    }
  if constexpr (2 * D < LANES) transpose<2 * D>(rows);
}

// n rows of `depth` numbers, `ld` apart -> a panel (depth, kAcross), 0 where there are no rows.
void pack_transposed(const float* from, int64_t ld, int64_t n, int64_t depth, float* panel) {
  for (int v = 0; v < 2; v++) {
    const float* rows = from + v * LANES * ld;
    float* to = panel + v * LANES;
    const int64_t there = std::clamp<int64_t>(n - v * LANES, 0, LANES);
    int64_t p = 0;
    if (there == LANES)
      for (; p + LANES <= depth; p += LANES) {
        Vec square[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) square[i] = load(rows + i * ld + p);
        transpose<1>(square);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) store(to + (p + i) * kAcross, square[i]);
      }
    for (; p < depth; p++)
      for (int i = 0; i < LANES; i++) to[p * kAcross + i] = i < there ? rows[i * ld + p] : 0.0f;
  }
}

// `depth` rows of n numbers, `ld` apart -> a panel (depth, kAcross), 0 where there are no columns.
void pack(const float* from, int64_t ld, int64_t n, int64_t depth, float* panel) {
  if (n == kAcross)
    for (int64_t p = 0; p < depth; p++) {
      store(panel + p * kAcross, load(from + p * ld));
      store(panel + p * kAcross + LANES, load(from + p * ld + LANES));
    }
  else
    for (int64_t p = 0; p < depth; p++)
      for (int v = 0; v < 2; v++)
        store(panel + p * kAcross + v * LANES, load_up_to(from + p * ld + v * LANES, n - v * LANES));
}

// n <= kDown rows of `depth` numbers, `ld` apart -> a strip (depth, kDown), or so many columns of one, and nothing behind
// them; and the rows' sum (depth). What stands in places of rows that are not there is never read.
void pack_strip(const float* from, int64_t ld, int64_t n, int64_t depth, float* strip, float* sums = nullptr) {
  int64_t p = 0;
  if constexpr (kDown <= LANES)
    for (; p + LANES <= depth; p += LANES) {
      Vec square[LANES], total = {};
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) square[i] = load(from + std::min<int64_t>(i, n - 1) * ld + p);
      if (sums) {
#pragma GCC unroll 16
        for (int i = 0; i < kDown; i++)
          if (i < n) total += square[i];
        store(sums + p, total);
      }
      transpose<1>(square);
      // A vector is longer than its place: the next is written over what is too much.
#pragma GCC unroll 16
      for (int i = 0; i + 1 < LANES; i++) store(strip + (p + i) * kDown, square[i]);
      std::memcpy(strip + (p + LANES - 1) * kDown, &square[LANES - 1], sizeof(float) * kDown);
    }
  for (; p < depth; p++) {
    float total = 0;
    for (int64_t i = 0; i < n; i++) total += strip[p * kDown + i] = from[i * ld + p];
    if (sums) sums[p] = total;
  }
}

// A panel of weights that is packed a part at a time, after each tile of the panel before it: what the tile's product
// fetched is still in the cache, which all of a panel, whose rows may share a few of its sets, would not be.
struct Packing {
  const float* from = nullptr;
  int64_t ld = 0, n = 0, depth = 0;
  bool transposed = false;
  float* panel = nullptr;
  int64_t done = 0;

  int64_t bound(int64_t part, int64_t parts) const {
    return part == parts ? depth : depth * part / parts / LANES * LANES;
  }
  Ahead ahead(int64_t part, int64_t parts) const {
    const int64_t more = bound(part + 1, parts) - done;
    if (more <= 0) return {};
    if (transposed) return {(const char*)(from + done), 4 * ld, n, ceil_div(more, kAcross)};
    return {(const char*)(from + done * ld), 4 * ld, more, 1};
  }
  void go_on(int64_t part, int64_t parts) {
    const int64_t more = bound(part + 1, parts) - done;
    if (more <= 0) return;
    if (transposed)
      pack_transposed(from + done, ld, n, more, panel + done * kAcross);
    else
      pack(from + done * ld, ld, n, more, panel + done * kAcross);
    done += more;
  }
  void finish() { go_on(0, 1); }
};

// ------------------------------------------------------------------------------------------------------------ the plan

struct Piece {
  int64_t from, rows;
};

// Rows of one expert that are worked on together.
struct Unit {
  int64_t expert, rows, at, strip;  // where they begin among the rows of the wave, and among its strips
  bool first;                       // of its expert
  std::vector<Piece> pieces;
  std::vector<int64_t> heights{};  // rows of its tiles

  int64_t tiles() const { return heights.size(); }
};

// Calls f(row of the unit, row of the map, rows) for tiles of nearly equal height.
template <class F>
inline void each_tile(const Unit& unit, F f) {
  int64_t before = 0;
  for (const Piece& piece : unit.pieces) {
    const int64_t parts = ceil_div(piece.rows, kDown);
    for (int64_t i = 0; i < parts; i++) {
      const int64_t from = piece.rows * i / parts, to = piece.rows * (i + 1) / parts;
      f(before + from, piece.from + from, to - from);
    }
    before += piece.rows;
  }
}

// A panel that a thread works on; `second`: of the layer that needs all hidden units of a unit.
struct Item {
  int64_t unit, panel;
  bool second;
};

struct Wave {
  int64_t from, to, rows, strips;  // units, and rows and strips of all of them
};

struct Mlp {
  int64_t sources, experts, dim, hidden;
  const int64_t* counts;      // (S, e)
  int64_t chunk;              // rows of a chunk of pre-activations
  std::vector<Unit> units{};  // expert by expert
  std::vector<Wave> waves{};
  int64_t most = 0, most_strips = 0, num_rows = 0;  // of a wave, and rows in all

  // Numbers between strips, so that no two begin in the same sets of a cache.
  static int64_t apart(int64_t depth) { return up(depth * kDown) + LANES; }
  bool streams_pre(const float* const* pre) const {
    bool all = true;
    for (int64_t c = 0; c * chunk < num_rows; c++) all = all && streams(pre[c], num_rows, hidden);
    return all;
  }
  int64_t panels(bool second) const { return ceil_div(second ? dim : hidden, kAcross); }

  void plan(int64_t threads) {
    std::vector<std::vector<Piece>> of(experts);
    int64_t at = 0;
    for (int64_t s = 0; s < sources; s++)
      for (int64_t e = 0; e < experts; e++) {
        const int64_t end = at + counts[s * experts + e];
        while (at < end) {  // chunks of pre-activations do not follow each other in memory
          const int64_t stop = std::min(end, (at / chunk + 1) * chunk);
          of[e].push_back({at, stop - at});
          at = stop;
        }
      }
    num_rows = at;
    for (int64_t e = 0; e < experts; e++) {
      int64_t rows = 0;
      for (const Piece& piece : of[e]) rows += piece.rows;
      const int64_t parts = ceil_div(rows, kRowsOfUnit);
      size_t next = 0;
      for (int64_t i = 0; i < parts; i++) {
        Unit unit{e, rows * (i + 1) / parts - rows * i / parts, 0, 0, i == 0, {}};
        for (int64_t missing = unit.rows; missing;) {
          Piece& piece = of[e][next];
          const int64_t taken = std::min(missing, piece.rows);
          unit.pieces.push_back({piece.from, taken});
          piece = {piece.from + taken, piece.rows - taken};
          if (!piece.rows) next++;
          missing -= taken;
        }
        each_tile(unit, [&](int64_t, int64_t, int64_t height) { unit.heights.push_back(height); });
        units.push_back(std::move(unit));
      }
    }
    const int64_t together = std::max<int64_t>(1, ceil_div(kPanelsOfThread * threads, panels(true)));
    for (int64_t u = 0; u < (int64_t)units.size(); u++) {
      // Two units of one expert add to the same gradients: one after the other.
      const bool full = waves.empty() || waves.back().to - waves.back().from == together;
      if (full || !units[u].first) waves.push_back({u, u, 0, 0});
      Wave& wave = waves.back();
      units[u].at = wave.rows;
      units[u].strip = wave.strips;
      wave.rows += units[u].rows;
      wave.strips += units[u].tiles();
      wave.to++;
      most = std::max(most, wave.rows);
      most_strips = std::max(most_strips, wave.strips);
    }
  }

  // Calls f(unit, panels from, to) for what this thread has of a wave: as many rows times panels as the others.
  template <class F>
  void shares(const Wave& wave, bool second, int64_t thread, int64_t threads, F f) const {
    const int64_t all = panels(second), total = wave.rows * all;
    const int64_t from = total * thread / threads, to = total * (thread + 1) / threads;
    int64_t before = 0;
    for (int64_t u = wave.from; u < wave.to; u++) {
      const int64_t rows = units[u].rows;
      const auto bound = [&](int64_t cost) {
        return cost < before ? 0 : std::min((cost - before + rows / 2) / rows, all);
      };
      const int64_t first = bound(from), last = bound(to);
      if (first < last) f(u, first, last);
      before += rows * all;
    }
  }

  // Calls f(unit, strip of the wave, row of the unit, row of the map, rows) for the tiles of a wave that a thread packs.
  template <class F>
  void tiles_of(const Wave& wave, int64_t thread, int64_t threads, F f) const {
    const int64_t from = wave.strips * thread / threads, to = wave.strips * (thread + 1) / threads;
    for (int64_t u = wave.from; u < wave.to; u++) {
      int64_t strip = units[u].strip;
      each_tile(units[u], [&](int64_t row, int64_t at, int64_t rows) {
        if (from <= strip && strip < to) f(units[u], strip, row, at, rows);
        strip++;
      });
    }
  }

  // Enough for any thread's items: where threads fill them, nobody would catch what an allocation throws.
  void make_room(std::vector<std::vector<Item>>& items, std::vector<std::vector<int64_t>>& ends) const {
    for (auto& own : items) own.reserve(units.size() * (panels(false) + panels(true)));
    for (auto& own : ends) own.reserve(2 * waves.size());
  }

  // All panels of a thread in the order in which it comes to them, and where those of each wave's layers end.
  void items(int64_t thread, int64_t threads, std::vector<Item>& all, std::vector<int64_t>& ends) const {
    for (const Wave& wave : waves)
      for (const bool second : {false, true}) {
        shares(wave, second, thread, threads, [&](int64_t u, int64_t from, int64_t to) {
          for (int64_t p = from; p < to; p++) all.push_back({u, p, second});
        });
        ends.push_back(all.size());
      }
  }
};

// A panel's columns of a strip.
inline Ahead part_of_strip(const float* at) { return rows_of(at, kAcross, kDown); }

// Sums of the columns of a panel over rows.
struct Sums {
  Vec now[2] = {};
  double total[kAcross] = {};
  int64_t rows = 0;

  inline void add(int v, Vec x) { now[v] += x; }
  void seen(int64_t n) {
    rows += n;
    if (rows + kDown > kRowsSummed) fold();
  }
  void fold() {
    for (int j = 0; j < kAcross; j++) total[j] += now[j / LANES][j % LANES];
    now[0] = now[1] = Vec{};
    rows = 0;
  }
  void add_to(float* out, int64_t n) {
    fold();
    for (int64_t j = 0; j < n; j++) out[j] += (float)total[j];
  }
};

// Working memory, which stays with the calling thread from call to call: what is given back to the system comes back as
// pages that are to be touched for the first time.
class Room {
 public:
  explicit Room(std::initializer_list<int64_t> sizes) {
    int64_t all = kAlign;
    for (const int64_t n : sizes) {
      starts.push_back(all - kAlign);
      all += (n + kAlign - 1) / kAlign * kAlign;
    }
    thread_local std::unique_ptr<float, Free> memory;
    thread_local int64_t there = 0;
    if (there < all) {
      there = 0;
      memory.reset();
      memory.reset(in_huge_pages(all));
      there = all;
    }
    begin = memory.get();
  }
  float* operator[](size_t i) const { return begin + starts[i]; }

 private:
  static constexpr int64_t kAlign = 16;
  static constexpr size_t kPage = size_t(1) << 21;
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };

  // n numbers that nobody has written yet, in huge pages where Linux has them: `huge_pages.py` says why.
  static float* in_huge_pages(int64_t n) {
    const size_t bytes = (sizeof(float) * n + kPage - 1) / kPage * kPage;
    void* memory = std::aligned_alloc(kPage, bytes);
    if (!memory) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    const char* asks = std::getenv("SWINMOE_HUGE_PAGES");
    if (!asks || std::strcmp(asks, "0")) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
    return static_cast<float*>(memory);
  }

  std::vector<int64_t> starts;
  float* begin;
};

// --------------------------------------------------------------------------------------------------------- activations

struct Gelu {
  static inline void both(Vec y, Vec& out, Vec& derivative) {
    const Parts of = parts(y);
    out = y * of.below;
    derivative = slope(y, of);
  }
  static inline Vec value(Vec y) { return ::value(y); }
};

struct Relu {
  static inline void both(Vec y, Vec& out, Vec& derivative) {
    out = value(y);
    derivative = y > 0.0f ? fill(1.0f) : Vec{};
  }
  static inline Vec value(Vec y) { return y < 0.0f ? Vec{} : y; }  // not a number where y is none
};

// ------------------------------------------------------------------------------------------------------------- forward

struct Forward {
  const float *x, *fc1, *b1, *fc2, *b2;
  float* out;         // (N, D)
  float* const* pre;  // chunks, or null where no backward pass follows
  Dropout dropout;
};

template <class Activation, bool DROPS>
void forward(const Mlp& m, const Forward& t, int64_t threads) {
  const int64_t D = m.dim, F = m.hidden, of_d = m.apart(D), of_f = m.apart(F);
  const int64_t depth = std::max(D, F);
  // Hidden units and rows of two waves, since a thread may be in the next one; two panels of each thread.
  const Room room{2 * m.most_strips * of_f, threads * 2 * depth * kAcross, 2 * m.most_strips * of_d};
  std::vector<std::vector<Item>> items(threads);
  std::vector<std::vector<int64_t>> ends(threads);
  m.make_room(items, ends);
  const bool streams_out = streams(t.out, m.num_rows, D), streams_pre = t.pre && m.streams_pre(t.pre);
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), there = omp_get_num_threads();
    alignas(64) float tile[kDown * kAcross];
    std::vector<Item>& own = items[thread];
    m.items(thread, there, own, ends[thread]);
    const auto packing_of = [&](size_t i) -> Packing {
      if (i >= own.size()) return {};
      const auto [unit, p, second] = own[i];
      const int64_t e = m.units[unit].expert, width = second ? D : F, ld = second ? F : D, at = p * kAcross;
      const float* from = (second ? t.fc2 : t.fc1) + (e * width + at) * ld;
      return {from, ld, std::min<int64_t>(kAcross, width - at), ld, true,
              room[1] + (2 * thread + i % 2) * depth * kAcross};
    };
    const auto pack_rows = [&](size_t w) {
      if (w >= m.waves.size()) return;
      float* to = room[2] + w % 2 * m.most_strips * of_d;
      m.tiles_of(m.waves[w], thread, there, [&](const Unit&, int64_t strip, int64_t, int64_t from, int64_t rows) {
        pack_strip(t.x + from * D, D, rows, D, to + strip * of_d);
      });
    };
    Packing now = packing_of(0);
    now.finish();
    pack_rows(0);
#pragma omp barrier
    size_t i = 0;
    for (size_t w = 0; w < m.waves.size(); w++) {
      const float* inputs = room[2] + w % 2 * m.most_strips * of_d;
      float* hidden = room[0] + w % 2 * m.most_strips * of_f;
      for (; i < (size_t)ends[thread][2 * w]; i++) {
        const Unit& unit = m.units[own[i].unit];
        const int64_t f = own[i].panel * kAcross, n = now.n, parts = unit.tiles();
        Vec bias[2] = {};
        if (t.b1)
          for (int v = 0; v < 2; v++) bias[v] = load_up_to(t.b1 + unit.expert * F + f + v * LANES, n - v * LANES);
        Packing next = packing_of(i + 1);
        int64_t part = 0;
        each_tile(unit, [&](int64_t, int64_t from, int64_t rows) {
          float* kept = t.pre ? t.pre[from / m.chunk] + from % m.chunk * F + f : nullptr;
          float* to = hidden + (unit.strip + part) * of_f + f * kDown;
          Fetched fetched{part_of_strip(to)};
          if (kept && !streams_pre) fetched.then_written = rows_of(kept, F, rows);
          fetched.weights = next.ahead(part, parts);
          multiply(rows, kHeights, D, inputs + (unit.strip + part) * of_d, now.panel, tile, fetched);
          for (int64_t r = 0; r < rows; r++) {
            const uint64_t key = DROPS ? t.dropout.key(from + r) : 0;
            for (int v = 0; v < 2; v++) {
              float* at = tile + r * kAcross + v * LANES;
              const Vec y = load(at) + bias[v];
              const int64_t some = n - v * LANES;
              Vec value = Activation::value(y);
              if (DROPS) value *= t.dropout.factors(key, f + v * LANES);
              if (some >= LANES) {
                if (streams_pre)
                  stream(kept + r * F + v * LANES, y);
                else if (kept)
                  store(kept + r * F + v * LANES, y);
              } else if (kept && some > 0) {
                store_some(kept + r * F + v * LANES, y, some);
              }
              store(at, value);
            }
          }
          pack_strip(tile, kAcross, rows, n, to);
          next.go_on(part++, parts);
        });
        now = next;
      }
      pack_rows(w + 1);
#pragma omp barrier
      for (; i < (size_t)ends[thread][2 * w + 1]; i++) {
        const Unit& unit = m.units[own[i].unit];
        const int64_t d = own[i].panel * kAcross, n = now.n, parts = unit.tiles();
        Vec bias[2] = {};
        if (t.b2)
          for (int v = 0; v < 2; v++) bias[v] = load_up_to(t.b2 + unit.expert * D + d + v * LANES, n - v * LANES);
        Packing next = packing_of(i + 1);
        int64_t part = 0;
        each_tile(unit, [&](int64_t, int64_t from, int64_t rows) {
          Fetched fetched{};
          if (!streams_out) fetched.written = rows_of(t.out + from * D + d, D, rows);
          fetched.weights = next.ahead(part, parts);
          multiply(rows, kHeights, F, hidden + (unit.strip + part) * of_f, now.panel, tile, fetched);
          for (int64_t r = 0; r < rows; r++) {
            float* sum = tile + r * kAcross;
            for (int v = 0; v < 2; v++) store(sum + v * LANES, load(sum + v * LANES) + bias[v]);
            put(t.out + (from + r) * D + d, sum, n, false, streams_out);
          }
          next.go_on(part++, parts);
        });
        now = next;
      }
    }
    finish_streams();
  }
}

// ------------------------------------------------------------------------------------------------------------ backward

struct Backward {
  const float *grad, *x, *fc1, *fc2;
  const float* const* pre;
  float *grad_x, *grad_fc1, *grad_b1, *grad_fc2, *grad_b2;  // null where nobody wants it; biases' begin as zeros
  bool add_fc1, add_fc2;                                    // to what is there, or written over it
  Dropout dropout;
};

template <class Activation, bool DROPS>
void backward(const Mlp& m, const Backward& t, int64_t threads) {
  const int64_t D = m.dim, F = m.hidden, of_d = m.apart(D), of_f = m.apart(F);
  const int64_t across_f = m.panels(false), across_d = m.panels(true);
  const int64_t depth = std::max(D, F), of_x = across_d * kAcross, of_sums = up(D);
  // Of two waves, since a thread may be in the next one, the gradients of pre-activations and of outputs, in strips, and
  // rows, panel by panel; of three the sums of outputs' gradients over each strip, since they are packed for the wave
  // after the next while the slowest adds up those of the last. A wave's hidden units, panel by panel; two panels of each
  // thread.
  const Room room{2 * m.most_strips * of_f,    2 * m.most_strips * of_d,   3 * m.most_strips * of_sums, 2 * m.most * of_x,
                  m.most * across_f * kAcross, threads * 2 * depth * kAcross};
  std::vector<std::vector<Item>> items(threads);
  std::vector<std::vector<int64_t>> ends(threads);
  m.make_room(items, ends);
  std::vector<char> has_rows(m.experts, 0);
  for (const Unit& unit : m.units) has_rows[unit.expert] = 1;
  const bool streams_x = t.grad_x && streams(t.grad_x, m.num_rows, D);
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), there = omp_get_num_threads();
    alignas(64) float tile[kDown * kAcross];
    std::vector<Item>& own = items[thread];
    m.items(thread, there, own, ends[thread]);
    const auto packing_of = [&](size_t i) -> Packing {
      if (i >= own.size()) return {};
      const auto [unit, p, second] = own[i];
      const int64_t width = second ? D : F, at = p * kAcross;
      const float* from = (second ? t.fc1 : t.fc2) + m.units[unit].expert * F * D + at;
      float* panel = room[5] + (2 * thread + i % 2) * depth * kAcross;
      return {from, width, std::min<int64_t>(kAcross, width - at), second ? F : D, false, panel};
    };
    const auto pack_rows = [&](size_t w) {
      if (w >= m.waves.size()) return;
      const int64_t before = w % 2 * m.most_strips;
      float* panels = room[3] + w % 2 * m.most * of_x;
      m.tiles_of(m.waves[w], thread, there, [&](const Unit& unit, int64_t strip, int64_t row, int64_t from, int64_t rows) {
        float* sums = t.grad_b2 ? room[2] + (w % 3 * m.most_strips + strip) * of_sums : nullptr;
        pack_strip(t.grad + from * D, D, rows, D, room[1] + (before + strip) * of_d, sums);
        for (int64_t p = 0; t.grad_fc1 && p < across_d; p++)
          pack(t.x + from * D + p * kAcross, D, std::min<int64_t>(kAcross, D - p * kAcross), rows,
               panels + unit.at * of_x + (p * unit.rows + row) * kAcross);
      });
    };
    Packing now = packing_of(0);
    now.finish();
    pack_rows(0);
#pragma omp barrier
    size_t i = 0;
    for (int64_t e = thread; e < m.experts; e += there) {
      if (has_rows[e]) continue;
      if (t.grad_fc1 && !t.add_fc1) std::fill(t.grad_fc1 + e * F * D, t.grad_fc1 + (e + 1) * F * D, 0.0f);
      if (t.grad_fc2 && !t.add_fc2) std::fill(t.grad_fc2 + e * F * D, t.grad_fc2 + (e + 1) * F * D, 0.0f);
    }
    // What hidden units `from` to `to` of a unit give to weights' gradients.
    const auto weight_gradients = [&](const Unit& unit, const float* grad_pre, const float* slopes, const float* x,
                                      int64_t from, int64_t to) {
      const int64_t e = unit.expert, rows = unit.rows;
      if (t.grad_fc2) {  // (D, rows) (rows, F)
        const bool add = t.add_fc2 || !unit.first;
        const int64_t parts = ceil_div(D, kDown);
        // One panel after another, with all left factors, which stay in the cache: of panels there is more than it holds.
        for (int64_t p = from; p < to; p++) {
          const float* values = room[4] + (unit.at * across_f + p * rows) * kAcross;
          const int64_t across = std::min<int64_t>(kAcross, F - p * kAcross);
          for (int64_t part = 0; part < parts; part++) {
            const int64_t d = D * part / parts, n = D * (part + 1) / parts - d;
            float* written = t.grad_fc2 + (e * D + d) * F + p * kAcross;
            multiply_over_rows(n, kHeights, unit.heights, slopes + d * kDown, of_d, values, tile, {rows_of(written, F, n)});
            for (int64_t r = 0; r < n; r++) put(written + r * F, tile + r * kAcross, across, add);
          }
        }
      }
      if (t.grad_fc1) {  // (F, rows) (rows, D)
        const bool add = t.add_fc1 || !unit.first;
        const int64_t begin = from * kAcross, end = std::min(to * kAcross, F);
        for (int64_t parts = ceil_div(end - begin, kDown), part = 0; part < parts; part++) {
          const int64_t f = begin + (end - begin) * part / parts, n = begin + (end - begin) * (part + 1) / parts - f;
          for (int64_t p = 0; p < across_d; p++) {
            float* to = t.grad_fc1 + (e * F + f) * D + p * kAcross;
            const int64_t across = std::min<int64_t>(kAcross, D - p * kAcross);
            multiply_over_rows(n, kHeights, unit.heights, grad_pre + f * kDown, of_f, x + p * rows * kAcross, tile,
                               {rows_of(to, D, n)});
            for (int64_t r = 0; r < n; r++) put(to + r * D, tile + r * kAcross, across, add);
          }
        }
      }
    };
    for (size_t w = 0; w < m.waves.size(); w++) {
      float* grads = room[0] + w % 2 * m.most_strips * of_f;
      const float* slopes = room[1] + w % 2 * m.most_strips * of_d;
      const size_t end = ends[thread][2 * w];
      for (size_t begun = i; i < end; i++) {
        const Unit& unit = m.units[own[i].unit];
        float* grad_pre = grads + unit.strip * of_f;
        const int64_t f = own[i].panel * kAcross, n = now.n, parts = unit.tiles();
        Packing next = packing_of(i + 1);
        int64_t part = 0;
        Sums sums;
        float* values = room[4] + (unit.at * across_f + own[i].panel * unit.rows) * kAcross;
        each_tile(unit, [&](int64_t row, int64_t from, int64_t rows) {
          const float* pre = t.pre[from / m.chunk] + from % m.chunk * F + f;
          float* to = grad_pre + part * of_f + f * kDown;
          const Fetched fetched{part_of_strip(to), {}, rows_of(pre, F, rows), next.ahead(part, parts)};
          multiply(rows, kHeights, D, slopes + (unit.strip + part) * of_d, now.panel, tile, fetched);
          for (int64_t r = 0; r < rows; r++) {
            const uint64_t key = DROPS ? t.dropout.key(from + r) : 0;
            for (int v = 0; v < 2; v++) {
              const Vec y = load_up_to(pre + r * F + v * LANES, n - v * LANES);
              Vec value, slope;
              Activation::both(y, value, slope);
              if (DROPS) {
                const Vec factors = t.dropout.factors(key, f + v * LANES);
                value *= factors;
                slope *= factors;
              }
              store(values + (row + r) * kAcross + v * LANES, value);
              float* at = tile + r * kAcross + v * LANES;
              const Vec grad = load(at) * slope;
              sums.add(v, grad);
              store(at, grad);
            }
          }
          pack_strip(tile, kAcross, rows, n, to);
          sums.seen(rows);
          next.go_on(part++, parts);
        });
        now = next;
        if (t.grad_b1) sums.add_to(t.grad_b1 + unit.expert * F + f, n);
        if (i + 1 == end || own[i + 1].unit != own[i].unit) {
          weight_gradients(unit, grad_pre, slopes + unit.strip * of_d, room[3] + (w % 2 * m.most + unit.at) * of_x,
                           own[begun].panel, own[i].panel + 1);
          begun = i + 1;
        }
      }
      pack_rows(w + 1);
#pragma omp barrier
      for (; i < (size_t)ends[thread][2 * w + 1]; i++) {
        const Unit& unit = m.units[own[i].unit];
        const int64_t d = own[i].panel * kAcross, n = now.n, parts = unit.tiles();
        if (t.grad_b2) {
          Sums sums;
          const float* of_strip = room[2] + (w % 3 * m.most_strips + unit.strip) * of_sums + d;
          for (const int64_t height : unit.heights) {
            for (int v = 0; v < 2; v++) sums.add(v, load_up_to(of_strip + v * LANES, n - v * LANES));
            sums.seen(height);
            of_strip += of_sums;
          }
          sums.add_to(t.grad_b2 + unit.expert * D + d, n);
        }
        Packing next = packing_of(i + 1);
        int64_t part = 0;
        if (t.grad_x)
          each_tile(unit, [&](int64_t, int64_t from, int64_t rows) {
            Fetched fetched{{}, {}, {}, next.ahead(part, parts)};
            if (!streams_x) fetched.written = rows_of(t.grad_x + from * D + d, D, rows);
            multiply(rows, kHeights, F, grads + (unit.strip + part) * of_f, now.panel, tile, fetched);
            for (int64_t r = 0; r < rows; r++) put(t.grad_x + (from + r) * D + d, tile + r * kAcross, n, false, streams_x);
            next.go_on(part++, parts);
          });
        next.finish();
        now = next;
      }
    }
    finish_streams();
  }
}

// Calls f with an activation and whether units are dropped, as types.
template <class F>
void as_types(int64_t activation, bool drops, F f) {
  const auto with = [&](auto a) { drops ? f(a, std::true_type()) : f(a, std::false_type()); };
  activation ? with(Relu()) : with(Gelu());
}

}  // namespace

extern "C" {

int swinmoe_lanes() { return LANES; }

// activation: 0 is GELU, 1 is ReLU; dropped: of 2^32 hidden units. 0, or 1 if there was no memory.
int swinmoe_expert_mlp_forward(int64_t sources, int64_t experts, int64_t dim, int64_t hidden, int64_t chunk,
                               int64_t activation, int64_t threads, const int64_t* counts, uint64_t seed,
                               uint32_t dropped, float scale, const float* x, const float* fc1, const float* b1,
                               const float* fc2, const float* b2, float* out, float* const* pre) try {
  Mlp m{sources, experts, dim, hidden, counts, chunk};
  m.plan(threads);
  const Forward t{x, fc1, b1, fc2, b2, out, pre, {seed, dropped, scale}};
  as_types(activation, dropped, [&](auto a, auto d) { forward<decltype(a), decltype(d)::value>(m, t, threads); });
  return 0;
} catch (...) {  // no memory, in one form or another
  return 1;
}

int swinmoe_expert_mlp_backward(int64_t sources, int64_t experts, int64_t dim, int64_t hidden, int64_t chunk,
                                int64_t activation, int64_t threads, const int64_t* counts, uint64_t seed,
                                uint32_t dropped, float scale, const float* grad, const float* x, const float* fc1,
                                const float* fc2, const float* const* pre, float* grad_x, float* grad_fc1,
                                float* grad_b1, float* grad_fc2, float* grad_b2, int64_t add_fc1, int64_t add_fc2) try {
  Mlp m{sources, experts, dim, hidden, counts, chunk};
  m.plan(threads);
  const Dropout dropout{seed, dropped, scale};
  const Backward t{grad,    x,        fc1,     fc2,          pre,          grad_x, grad_fc1,
                   grad_b1, grad_fc2, grad_b2, add_fc1 != 0, add_fc2 != 0, dropout};
  as_types(activation, dropped, [&](auto a, auto d) { backward<decltype(a), decltype(d)::value>(m, t, threads); });
  return 0;
} catch (...) {  // no memory, in one form or another
  return 1;
}

}  // extern "C"
