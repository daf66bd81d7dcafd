// Matrix products and attention of bfloat16 tensors on a CPU with matrix units (Intel AMX), with what stands around
// them done while the numbers are at hand.
//
// A product's numbers are sums over its inner dimension in order, in single precision, rounded once: whatever the
// number of rows, their place, or the number of threads. heft_engine.cpu.amx holds them to torch's.
//
// A weight (out, in) is packed as [out / 16][in / 32] tiles of 16 pairs of inputs by 16 outputs, a kilobyte each.

#include "norms.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <vector>

namespace {

using namespace heft;

constexpr long kTile = 16, kPairs = 32, kTileSize = kTile * kPairs;
// Rows that a product takes at once: as many as stay in a core's cache, in bytes, and at most so many.
constexpr long kCached = 1 << 20, kMostRows = 256;

// Tiles of inputs that a product takes at once: two tiles of weights each, 1 kB a tile, beside what else the nearest cache
// holds.
constexpr long kDeep = 18;

struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// The tiles of this thread, from here to the end of the scope; other libraries set their own.
class Tiles {
 public:
  Tiles() {
    TileConfiguration all;
    for (int tile = 0; tile < 8; tile++) all.row_bytes[tile] = 64, all.rows[tile] = 16;
    asm volatile("ldtilecfg %0" : : "m"(all));
  }
  ~Tiles() { _tile_release(); }
};

// Tiles are read behind the compiler's back: what was written before must be in memory by then.
inline void written() { asm volatile("" : : : "memory"); }

// What a thread's own memory is for. Of three in a row, the second and third serve the same additions.
enum Use { kTail, kColumns, kKeysAndValues, kScores, kShares, kNormed, kSums, kAdded, kAddedToUp = kAdded + 3 };

// A thread's own memory, kept from call to call.
template <typename T, int kUse>
T* scratch(size_t elements) {
  thread_local struct Held {
    T* at = nullptr;
    size_t size = 0;
    ~Held() { std::free(at); }
  } held;
  if (held.size < elements) {
    std::free(held.at);
    held.size = (elements + 4095) / 4096 * 4096;
    held.at = static_cast<T*>(std::aligned_alloc(64, held.size * sizeof(T)));
    if (held.at == nullptr) std::abort();
  }
  return held.at;
}

// 16 × 16 words, in place: row r becomes column r.
inline void transpose(__m512i* rows) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    rows[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    rows[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    rows[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    rows[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// One column of tiles: 16 outputs of a weight (…, in), the first `outs` of which are there.
inline void pack_column(const bf16* weight, bf16* to, long in, long outs = kTile) {
  for (long k = 0; k < in; k += kPairs, to += kTileSize) {
    __m512i rows[16];
    for (int r = 0; r < 16; r++)
      rows[r] = r < outs ? _mm512_loadu_si512(weight + r * in + k) : _mm512_setzero_si512();
    transpose(rows);
    for (int r = 0; r < 16; r++) _mm512_store_si512(to + r * kPairs, rows[r]);
  }
}

// Two columns of tiles that are multiplied next, so many bytes each; null where that isn't known. Weights come from far
// away, and nobody else asks for them in time.
struct Next {
  const bf16 *left, *right;
  long bytes;
};

// A weight, packed or as it came.
struct Weight {
  const bf16* at;
  long in, out;
  bool packed;

  // Pairs of columns of tiles; the last one may be half.
  long pairs() const { return (out / kTile + 1) / 2; }

  long column_bytes() const { return in * kTile * long(sizeof(bf16)); }

  // Columns that are packed, to be fetched ahead.
  Next next(long left, long right) const {
    if (!packed || right >= out / kTile) return {nullptr, nullptr, 0};
    return {at + left * in * kTile, at + right * in * kTile, column_bytes()};
  }

  // Column `index` of tiles; what is not packed is, into `room`.
  const bf16* column(long index, bf16* room) const {
    if (packed) return at + index * in * kTile;
    pack_column(at + index * kTile * in, room, in);
    return room;
  }
};

// What a low-rank adapter adds to some rows of a product: (x · downᵀ, rounded) · up, before the product is rounded. down
// (rank, in), up (rank, out). Other rows get zero times `up`, which must be finite.
struct Addition {
  int64_t start, count;
  const bf16 *down, *up;
  int64_t rank;
};

// The rows of a product's input, as they lie in memory or as tiles: [rows / 16][in / 32] tiles of 16 rows by 32 inputs, of
// whole blocks of 32 rows.
struct Rows {
  const bf16* at;
  long rows, in;
  // From row to row of a tile, and from tile to tile of the same rows.
  long stride, step;
  // What is left after whole blocks of 32 rows, where memory ends there.
  const bf16* tail;

  const bf16* block(long row) const { return tail && row + 32 > rows ? tail : at + row * in; }
  Rows part(long first, long end) const { return {at + first * in, end - first, in, stride, step, tail}; }
};

inline Rows as_they_lie(const bf16* x, long rows, long in) {
  const long whole = rows / 32 * 32, left_over = rows - whole;
  bf16* tail = nullptr;
  if (left_over) {
    tail = scratch<bf16, kTail>(32 * in);
    std::memcpy(tail, x + whole * in, left_over * in * sizeof(bf16));
    std::memset(tail + left_over * in, 0, (32 - left_over) * in * sizeof(bf16));
  }
  return {x, rows, in, in, kPairs, tail};
}

inline Rows as_tiles(const bf16* x, long rows, long in) { return {x, rows, in, kPairs, kTileSize, nullptr}; }

// Where a row's inputs `column` … lie in tiles of rows with so many.
inline bf16* in_tiles(bf16* tiles, long row, long column, long in) {
  return tiles + row / kTile * kTile * in + column / kPairs * kTileSize + row % kTile * kPairs + column % kPairs;
}

// Adds 32 rows by two columns of tiles, over tiles of inputs first … end - 1, to `sums`: tiles (rows 0 … 15, left),
// (…, right), (16 … 31, left), (…, right). `more` adds to the tiles 0 … 3; `meanwhile` is called with every step, when the
// vector units have nothing to do.
template <typename More, typename Meanwhile>
inline void multiply(
    const bf16* x, const Rows& rows, const bf16* left, const bf16* right, long first, long end, float* sums,
    const More& more, const Meanwhile& meanwhile) {
  const long bytes = rows.stride * sizeof(bf16);
  const bf16* below = x + kTile * rows.in;
  written();
  if (first == 0) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
    _tile_loadd(2, sums + 512, 64);
    _tile_loadd(3, sums + 768, 64);
  }
  for (long k = first; k < end; k++) {
    // Rows pass by; the columns are to stay in the cache.
    _tile_stream_loadd(4, x + k * rows.step, bytes);
    _tile_stream_loadd(5, below + k * rows.step, bytes);
    _tile_loadd(6, left + k * kTileSize, 64);
    _tile_loadd(7, right + k * kTileSize, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    meanwhile();
  }
  more();
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  _tile_stored(2, sums + 512, 64);
  _tile_stored(3, sums + 768, 64);
}

// The same of 16 rows.
template <typename More, typename Meanwhile>
inline void multiply_half(
    const bf16* x, const Rows& rows, const bf16* left, const bf16* right, long first, long end, float* sums,
    const More& more, const Meanwhile& meanwhile) {
  written();
  if (first == 0) {
    _tile_zero(0);
    _tile_zero(1);
  } else {
    _tile_loadd(0, sums, 64);
    _tile_loadd(1, sums + 256, 64);
  }
  for (long k = first; k < end; k++) {
    _tile_loadd(4, x + k * rows.step, rows.stride * sizeof(bf16));
    _tile_loadd(6, left + k * kTileSize, 64);
    _tile_loadd(7, right + k * kTileSize, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    meanwhile();
  }
  more();
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
}

// Rows times two columns of tiles. `more` adds to the tiles of the block that begins at a row; `take` is given a row and
// its 16 + 16 sums.
template <typename More, typename Take>
inline void column_pair(
    const Rows& x, const bf16* left, const bf16* right, const Next& next, const More& more, const Take& take) {
  // So many inputs at a time that the columns' part of them stays in the nearest cache; sums wait in the next.
  const long steps = x.in / kPairs, blocks = (x.rows + 31) / 32;
  const bool at_once = steps <= kDeep;
  float* all = scratch<float, kSums>((at_once ? 2 : blocks) * 1024);
  // A block's sums are taken while the next one is multiplied.
  long taken = 0, ready = 0;
  const auto take_some = [&](long count) {
    for (const long end = std::min(ready, taken + count); taken < end; taken++) {
      const long block = taken / 32, r = taken % 32;
      const float* at = all + (at_once ? block % 2 : block) * 1024 + r / kTile * 512 + r % kTile * kTile;
      take(taken, _mm512_load_ps(at), _mm512_load_ps(at + 256));
    }
  };
  // All of what comes next, in equal shares with every step.
  constexpr long kLine = 64;
  const long lines = next.left ? 2 * next.bytes / kLine : 0, share = (lines + blocks * steps - 1) / (blocks * steps);
  long fetched = 0;
  const auto fetch_some = [&] {
    for (const long end = std::min(lines, fetched + share); fetched < end; fetched++) {
      const long at = fetched * kLine;
      const char* from = at < next.bytes ? (const char*)next.left + at : (const char*)next.right + at - next.bytes;
      _mm_prefetch(from, _MM_HINT_T1);
    }
  };
  for (long first = 0; first < steps; first += kDeep) {
    const long end = std::min(steps, first + kDeep);
    const bool is_last = end == steps;
    for (long block = 0; block < blocks; block++) {
      const long row = 32 * block, count = std::min(32L, x.rows - row);
      float* sums = all + (at_once ? block % 2 : block) * 1024;
      const auto finish = [&] {
        if (is_last) more(row);
      };
      const auto meanwhile = [&] {
        take_some(2);
        fetch_some();
      };
      if (count > kTile) {
        multiply(x.block(row), x, left, right, first, end, sums, finish, meanwhile);
      } else {
        multiply_half(x.block(row), x, left, right, first, end, sums, finish, meanwhile);
      }
      if (!is_last) continue;
      take_some(32);
      ready = row + count;
    }
  }
  take_some(32);
}

// Of two vectors, elements start … start + 15 in turn.
inline __m512i turns(int start) {
  alignas(64) uint16_t index[32];
  for (int i = 0; i < 16; i++) index[2 * i] = start + i, index[2 * i + 1] = 32 + start + i;
  return _mm512_load_si512(index);
}

// The additions to some rows of one product, for one thread. kUse: of the thread's memory.
template <int kUse>
class Additions {
 public:
  // To a product of x, which begins at row `first` of the pass.
  Additions(const Addition* all, long count, const Rows& x, long first) {
    const long rows = x.rows, in = x.in;
    size_t room = 0;
    for (long i = 0; i < count; i++) {
      const long begin = std::max<long>(all[i].start - first, 0);
      const long end = std::min<long>(all[i].start + all[i].count - first, rows);
      if (begin >= end) continue;
      Own own{&all[i], begin, end, begin / 32 * 32, (end + 31) / 32 * 32, (all[i].rank + 31) / 32, room};
      room += (own.top - own.base) * own.steps * kPairs;
      own_.push_back(own);
    }
    if (own_.empty()) return;
    low_ = scratch<bf16, kUse>(room);
    std::memset(low_, 0, room * sizeof(bf16));
    bf16* columns = scratch<bf16, kUse + 1>(2 * kTile * in);
    for (const Own& own : own_)
      for (long step = 0; step < own.steps; step++) {
        for (long half = 0; half < 2; half++) {
          const long row = step * kPairs + half * kTile;
          const long there = std::max(0L, std::min<long>(own.of->rank - row, kTile));
          pack_column(own.of->down + row * in, columns + half * kTile * in, in, there);
        }
        const long stride = own.steps * kPairs;
        bf16* to = low_ + own.at + step * kPairs;
        column_pair(
            x.part(own.base, std::min(own.top, rows)), columns, columns + kTile * in, Next{}, [](long) {},
            [&](long row, __m512 left, __m512 right) {
              if (row + own.base >= own.begin && row + own.base < own.end)
                _mm512_storeu_si512(to + row * stride, (__m512i)_mm512_cvtne2ps_pbh(right, left));
            });
      }
  }

  // The pair of columns that begins at `column`; of the second as far as there is one.
  void take(long column, long width, bool both) {
    if (own_.empty()) return;
    size_t room = 0;
    for (Own& own : own_) own.tiles = room, room += own.steps * 2 * kTileSize;
    tiles_ = scratch<bf16, kUse + 2>(room);
    for (const Own& own : own_) take_up(own, own.of->up + column, width, both ? ~0u : 0xffffu);
  }

  // Adds to the tiles of the 32 rows that begin at `row`.
  void add(long row) const {
    written();
    for (const Own& own : own_) {
      if (row < own.base || row >= own.top) continue;
      const long stride = own.steps * kPairs;
      const bf16* low = low_ + own.at + (row - own.base) * stride;
      for (long step = 0; step < own.steps; step++) {
        const bf16* tile = tiles_ + own.tiles + step * 2 * kTileSize;
        _tile_loadd(4, low + step * kPairs, stride * sizeof(bf16));
        _tile_loadd(5, low + kTile * stride + step * kPairs, stride * sizeof(bf16));
        _tile_loadd(6, tile, 64);
        _tile_loadd(7, tile + kTileSize, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
  }

  // The same to the left tiles alone, and to the right ones.
  void add_left(long row) const { add_one<false>(row); }
  void add_right(long row) const { add_one<true>(row); }

 private:
  struct Own {
    const Addition* of;
    long begin, end, base, top, steps;
    size_t at, tiles = 0;
  };

  void take_up(const Own& own, const bf16* up, long width, __mmask32 mask) {
    const __m512i low = turns(0), high = turns(16);
    bf16* to = tiles_ + own.tiles;
    for (long step = 0; step < own.steps; step++, to += 2 * kTileSize)
      for (long pair = 0; pair < 16; pair++) {
        const long rank = step * kPairs + 2 * pair;
        const bf16* from = up + rank * width;
        const __m512i even = rank < own.of->rank ? _mm512_maskz_loadu_epi16(mask, from) : _mm512_setzero_si512();
        const __m512i odd =
            rank + 1 < own.of->rank ? _mm512_maskz_loadu_epi16(mask, from + width) : _mm512_setzero_si512();
        _mm512_store_si512(to + pair * kPairs, _mm512_permutex2var_epi16(even, low, odd));
        _mm512_store_si512(to + kTileSize + pair * kPairs, _mm512_permutex2var_epi16(even, high, odd));
      }
  }

  template <bool kRight>
  void add_one(long row) const {
    written();
    for (const Own& own : own_) {
      if (row < own.base || row >= own.top) continue;
      const long stride = own.steps * kPairs;
      const bf16* low = low_ + own.at + (row - own.base) * stride;
      for (long step = 0; step < own.steps; step++) {
        _tile_loadd(4, low + step * kPairs, stride * sizeof(bf16));
        _tile_loadd(5, low + kTile * stride + step * kPairs, stride * sizeof(bf16));
        _tile_loadd(6, tiles_ + own.tiles + step * 2 * kTileSize, 64);
        if constexpr (kRight) {
          _tile_dpbf16ps(1, 4, 6);
          _tile_dpbf16ps(3, 5, 6);
        } else {
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(2, 5, 6);
        }
      }
    }
  }

  std::vector<Own> own_;
  bf16 *low_ = nullptr, *tiles_ = nullptr;
};

inline Floats rounded_sum(__m512 sum) { return through_bf16((Floats)sum); }

inline long rows_at_once(long in) { return std::max(32L, std::min(kMostRows, kCached / (2 * in) / 32 * 32)); }

// 2 to the power of x, to 2e-7 of it.
inline __m512 power_of_two(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, whole);
  __m512 sum = _mm512_set1_ps(1.33335581e-3f);
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(9.61812911e-3f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.55041087e-2f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(2.40226507e-1f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(6.93147181e-1f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(sum, whole);
}

// As torch's once it is rounded to bfloat16, for every x that is a bfloat16 from 2⁻¹²⁵ on
// (heft_engine.cpu.amx tries them all).
inline __m512 silu_of_bf16(__m512 x) {
  const __m512 infinite = _mm512_set1_ps(INFINITY);
  __m512 power = _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504088896340736f));
  power = _mm512_max_ps(_mm512_min_ps(power, _mm512_set1_ps(127.9f)), _mm512_set1_ps(-200.0f));
  const __m512 divisor = _mm512_add_ps(power_of_two(power), _mm512_set1_ps(1.0f));
  __m512 reciprocal = _mm512_rcp14_ps(divisor);
  reciprocal = _mm512_mul_ps(reciprocal, _mm512_fnmadd_ps(divisor, reciprocal, _mm512_set1_ps(2.0f)));
  const __m512 quotient = _mm512_mul_ps(x, reciprocal);
  const __m512 rest = _mm512_fnmadd_ps(divisor, quotient, x);
  // Left of this torch's exponential is infinite; what is no number stays none.
  __mmask16 is_left = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-88.75f), _CMP_LE_OQ);
  is_left &= _mm512_cmp_ps_mask(x, _mm512_sub_ps(_mm512_setzero_ps(), infinite), _CMP_NEQ_UQ);
  const __m512 found = _mm512_maskz_fmadd_ps(_mm512_knot(is_left), rest, reciprocal, quotient);
  return _mm512_mask_mov_ps(found, _mm512_cmp_ps_mask(x, infinite, _CMP_EQ_OQ), infinite);
}

// A pair of columns of out = x · weightᵀ (+ additions) (+ bias), rounded (+ residual, rounded).
template <int kUse>
void product_columns(
    const Rows& x, const Weight& weight, const bf16* bias, const bf16* residual, bf16* out, long pair,
    Additions<kUse>& additions) {
  bf16* room = weight.packed ? nullptr : scratch<bf16, kColumns>(2 * kTile * weight.in);
  const bool both = 2 * pair + 1 < weight.out / kTile;
  const bf16* left = weight.column(2 * pair, room);
  const bf16* right = both ? weight.column(2 * pair + 1, room ? room + kTile * weight.in : nullptr) : left;
  const long column = 2 * pair * kTile, width = weight.out;
  additions.take(column, width, both);
  const __m512 low_bias = bias ? (__m512)load(bias + column) : _mm512_setzero_ps();
  const __m512 high_bias = bias && both ? (__m512)load(bias + column + kTile) : _mm512_setzero_ps();
  const auto take = [=](long row, __m512 low, __m512 high) {
    bf16* to = out + row * width + column;
    if (bias) low = _mm512_add_ps(low, low_bias), high = _mm512_add_ps(high, high_bias);
    if (residual) {
      const bf16* from = residual + row * width + column;
      low = (__m512)(rounded_sum(low) + load(from));
      if (both) high = (__m512)(rounded_sum(high) + load(from + kTile));
    }
    if (both) {
      _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    } else {
      _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(low));
    }
  };
  column_pair(x, left, right, weight.next(2 * pair + 2, 2 * pair + 3), [&](long row) { additions.add(row); }, take);
}

// The norm of x (rows, width), as tiles. All threads of a team come here.
inline void norm_to_tiles(
    const bf16* x, const bf16* weight, float epsilon, bf16* tiles, long rows, long width) {
  bf16* normed = scratch<bf16, kNormed>(width);
#pragma omp for
  for (long row = 0; row < rows; row++) {
    normalise(x + row * width, weight, normed, width, epsilon);
    for (long column = 0; column < width; column += kPairs)
      std::memcpy(in_tiles(tiles, row, column, width), normed + column, kPairs * sizeof(bf16));
  }
}

// Neighbouring queries of one sequence, the last of all its keys' tokens.
struct Segment {
  int64_t first_query, queries, first_piece, pieces;
};

// Neighbouring tokens of a source.
struct Piece {
  int64_t source, start, tokens;
};

// Keys and values, so many elements from token to token and from head to head.
struct Source {
  const bf16 *keys, *values;
  int64_t key_token, key_head, value_token, value_head;
};

// One head's keys as [tokens / 16][width / 32] tiles, its values as [tokens / 32][width / 16]; zero beyond the tokens.
class KeysAndValues {
 public:
  long tokens = 0;
  const bf16 *keys = nullptr, *values = nullptr;

  void take(const Segment& segment, const Piece* pieces, const Source* sources, long head, long width) {
    if (&segment == segment_ && head == head_) return;
    segment_ = &segment, head_ = head;
    tokens = 0;
    for (long i = 0; i < segment.pieces; i++) tokens += pieces[segment.first_piece + i].tokens;
    const long filled = (tokens + 31) / 32 * 32;
    at_.resize(2 * filled);
    static const bf16 zeros[1024] = {};
    long token = 0;
    for (long i = 0; i < segment.pieces; i++) {
      const Piece& piece = pieces[segment.first_piece + i];
      const Source& source = sources[piece.source];
      for (long t = piece.start; t < piece.start + piece.tokens; t++, token++) {
        at_[token] = source.keys + t * source.key_token + head * source.key_head;
        at_[filled + token] = source.values + t * source.value_token + head * source.value_head;
      }
    }
    for (; token < filled; token++) at_[token] = at_[filled + token] = zeros;
    bf16* to = scratch<bf16, kKeysAndValues>(2 * filled * width);
    keys = to;
    for (long block = 0; block < filled; block += kTile)
      for (long d = 0; d < width; d += kPairs, to += kTileSize) {
        __m512i rows[16];
        for (int r = 0; r < 16; r++) rows[r] = _mm512_loadu_si512(at_[block + r] + d);
        transpose(rows);
        for (int r = 0; r < 16; r++) _mm512_store_si512(to + r * kPairs, rows[r]);
      }
    values = to;
    const __m512i first = turns(0), second = turns(16);
    const bf16* const* value = at_.data() + filled;
    for (long block = 0; block < filled; block += kPairs, to += kPairs * width)
      for (long d = 0; d < width; d += kPairs)
        for (int pair = 0; pair < 16; pair++) {
          const __m512i even = _mm512_loadu_si512(value[block + 2 * pair] + d);
          const __m512i odd = _mm512_loadu_si512(value[block + 2 * pair + 1] + d);
          bf16* tile = to + d / kTile * kTileSize + pair * kPairs;
          _mm512_store_si512(tile, _mm512_permutex2var_epi16(even, first, odd));
          _mm512_store_si512(tile + kTileSize, _mm512_permutex2var_epi16(even, second, odd));
        }
  }

 private:
  const Segment* segment_ = nullptr;
  long head_ = -1;
  std::vector<const bf16*> at_;
};

// Up to 32 neighbouring queries of one head: softmax(scale · q·kᵀ)·v over what each sees.
void attend_block(
    const bf16* query, bf16* out, long rows, long stride, long position, const KeysAndValues& kept, long width,
    float scale, long window) {
  const bool below = rows > kTile;
  alignas(64) bf16 filled[32 * 256];
  const bf16* q = query;
  long q_stride = stride;
  if (rows != 32 && rows != kTile) {
    for (long r = 0; r < (below ? 32 : kTile); r++) {
      if (r < rows) std::memcpy(filled + r * width, query + r * stride, width * sizeof(bf16));
      else std::memset(filled + r * width, 0, width * sizeof(bf16));
    }
    q = filled, q_stride = width;
  }
  // The first and last key that any of the rows sees, in whole tiles of 32.
  const long begin = window ? std::max(0L, position - window + 1) / 32 * 32 : 0;
  const long end = (position + rows + 31) / 32 * 32, columns = end - begin;
  // Rows that begin a multiple of a page apart would push one another out of the cache.
  const long score_stride = columns + 16, share_stride = columns + 32;
  float* scores = scratch<float, kScores>(32 * score_stride);
  bf16* shares = scratch<bf16, kShares>(32 * share_stride);
  written();
  for (long k = begin; k < end; k += 32) {
    const bf16 *left = kept.keys + k * width, *right = left + kTile * width;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long d = 0; d < width / kPairs; d++) {
      _tile_loadd(4, q + d * kPairs, q_stride * sizeof(bf16));
      _tile_loadd(6, left + d * kTileSize, 64);
      _tile_loadd(7, right + d * kTileSize, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (below) {
        _tile_loadd(5, q + kTile * q_stride + d * kPairs, q_stride * sizeof(bf16));
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    float* to = scores + k - begin;
    _tile_stored(0, to, score_stride * sizeof(float));
    _tile_stored(1, to + kTile, score_stride * sizeof(float));
    if (below) {
      _tile_stored(2, to + kTile * score_stride, score_stride * sizeof(float));
      _tile_stored(3, to + kTile * score_stride + kTile, score_stride * sizeof(float));
    }
  }
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512 rate = _mm512_set1_ps(scale * 1.44269504088896340736f);
  float reciprocals[32] = {};
  for (long r = 0; r < rows; r++) {
    const float* from = scores + r * score_stride;
    bf16* to = shares + r * share_stride;
    // Of this row, keys first … last (exclusive), counted from `begin`.
    const long last = position + r + 1 - begin;
    const long first = window ? std::max(0L, position + r + 1 - window) - begin : 0;
    const auto seen = [&](long at) {
      const __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32(int(at)));
      return _mm512_cmplt_epi32_mask(index, _mm512_set1_epi32(int(last))) &
             _mm512_cmpge_epi32_mask(index, _mm512_set1_epi32(int(first)));
    };
    const long start = first / kTile * kTile, whole = first > start ? start + kTile : start;
    const long inside = std::max(whole, last / kTile * kTile);
    __m512 most = _mm512_set1_ps(-INFINITY);
    const auto masked_most = [&](long at) { most = _mm512_mask_max_ps(most, seen(at), most, _mm512_loadu_ps(from + at)); };
    if (start < whole) masked_most(start);
    for (long at = whole; at < inside; at += kTile) most = _mm512_max_ps(most, _mm512_loadu_ps(from + at));
    if (inside < last) masked_most(inside);
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    __m512 total = _mm512_setzero_ps();
    for (long at = 0; at < start; at += kTile) _mm256_store_si256((__m256i*)(to + at), _mm256_setzero_si256());
    const auto share = [&](long at, __mmask16 mask) {
      const __m512 power = _mm512_maskz_mov_ps(
          mask, power_of_two(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(from + at), top), rate)));
      total = _mm512_add_ps(total, power);
      _mm256_store_si256((__m256i*)(to + at), (__m256i)_mm512_cvtneps_pbh(power));
    };
    if (start < whole) share(start, seen(start));
    for (long at = whole; at < inside; at += kTile) share(at, 0xffff);
    long at = inside;
    if (at < last) share(at, seen(at)), at += kTile;
    for (; at < columns; at += kTile) _mm256_store_si256((__m256i*)(to + at), _mm256_setzero_si256());
    reciprocals[r] = 1.0f / _mm512_reduce_add_ps(total);
  }
  // Rows that are not there must be numbers.
  for (long r = rows; r < (below ? 32 : kTile); r++) std::memset(shares + r * share_stride, 0, columns * sizeof(bf16));
  written();
  for (long d = 0; d < width; d += kPairs) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long k = 0; k < columns; k += kPairs) {
      const bf16* values = kept.values + (begin + k) * width + d / kTile * kTileSize;
      _tile_loadd(4, shares + k, share_stride * sizeof(bf16));
      _tile_loadd(6, values, 64);
      _tile_loadd(7, values + kTileSize, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (below) {
        _tile_loadd(5, shares + kTile * share_stride + k, share_stride * sizeof(bf16));
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    alignas(64) float sums[1024];
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + 256, 64);
    if (below) {
      _tile_stored(2, sums + 512, 64);
      _tile_stored(3, sums + 768, 64);
    }
    for (long r = 0; r < rows; r++) {
      const float* at = sums + r / kTile * 512 + r % kTile * kTile;
      const __m512 reciprocal = _mm512_set1_ps(reciprocals[r]);
      const __m512 low = _mm512_mul_ps(_mm512_load_ps(at), reciprocal);
      const __m512 high = _mm512_mul_ps(_mm512_load_ps(at + 256), reciprocal);
      _mm512_storeu_si512(out + r * stride + d, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }
}

}  // namespace

extern "C" {

// Whether this process may use the units: it has to ask for it once (Documentation/arch/x86/xstate.rst).
int heft_units_ready() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0; }

// A weight (out, in) as tiles; in a multiple of 32, out of 16.
void heft_units_pack(const bf16* weight, bf16* packed, long in, long out) {
#pragma omp parallel for
  for (long column = 0; column < out / kTile; column++)
    pack_column(weight + column * kTile * in, packed + column * kTile * in, in);
}

// out = x · weightᵀ + additions + bias, + residual: x (rows, in), out and residual (rows, out). bias and residual may be
// null.
void heft_units_product(
    const bf16* x, const bf16* weight, int packed, const bf16* bias, const bf16* residual, const int64_t* additions,
    long n_additions, bf16* out, long rows, long in, long columns) {
  const Weight w{weight, in, columns, bool(packed)};
  const long chunk = rows_at_once(in);
  const auto* more = reinterpret_cast<const Addition*>(additions);
#pragma omp parallel if (in * columns > 65536)
  {
    Tiles tiles;
    for (long first = 0; first < rows; first += chunk) {
      const Rows some = as_they_lie(x + first * in, std::min(chunk, rows - first), in);
      Additions<kAdded> adds(more, n_additions, some, first);
      const bf16* from = residual ? residual + first * columns : nullptr;
#pragma omp for nowait
      for (long pair = 0; pair < w.pairs(); pair++)
        product_columns(some, w, bias, from, out + first * columns, pair, adds);
    }
  }
}

// A product of a layer's normed states.
struct Projection {
  const bf16 *weight, *bias;
  int64_t packed, columns;
  const bf16* out;
  int64_t first_addition, additions;
};

// out = norm(states) · weightᵀ + additions + bias for each of `count` projections: states (rows, in), norm (in,). `normed`
// has room for rows · in, of whole blocks of 32 rows, at most 256 rows.
void heft_units_projections(
    const bf16* states, const bf16* norm, float epsilon, const int64_t* projections, long count,
    const int64_t* additions, bf16* normed, long rows, long in) {
  const auto* all = reinterpret_cast<const Projection*>(projections);
  const auto* more = reinterpret_cast<const Addition*>(additions);
  const long chunk = rows_at_once(in);
#pragma omp parallel
  {
    Tiles tiles;
    for (long first = 0; first < rows; first += chunk) {
      const Rows some = as_tiles(normed, std::min(chunk, rows - first), in);
      norm_to_tiles(states + first * in, norm, epsilon, normed, some.rows, in);
      for (long i = 0; i < count; i++) {
        const Projection& one = all[i];
        const Weight weight{one.weight, in, one.columns, bool(one.packed)};
        Additions<kAdded> adds(more + one.first_addition, one.additions, some, first);
        bf16* out = const_cast<bf16*>(one.out) + first * one.columns;
#pragma omp for nowait
        for (long pair = 0; pair < weight.pairs(); pair++)
          product_columns(some, weight, one.bias, nullptr, out, pair, adds);
      }
#pragma omp barrier
    }
  }
}

// out = (SiLU(x · gateᵀ) ⊙ (x · upᵀ)) · downᵀ + states with x = norm(states): states and out (rows, width), norm (width,),
// gate and up (inner, width), down (width, inner). Every product, SiLU, ⊙ and sum is rounded to bfloat16. `normed` and
// `active` have room for rows · width and rows · inner, of whole blocks of 32 rows, at most 256 rows. Additions: those to
// gate first, then those to up, then those to down.
void heft_units_gated(
    const bf16* states, const bf16* norm, float epsilon, const bf16* gate, const bf16* up, const bf16* down,
    int packed, const int64_t* additions, long to_gate, long to_up, long to_down, bf16* out, bf16* normed,
    bf16* active, long rows, long width, long inner) {
  const Weight gates{gate, width, inner, bool(packed)}, ups{up, width, inner, bool(packed)};
  const Weight downs{down, inner, width, bool(packed)};
  const long chunk = rows_at_once(std::max(width, inner));
  const auto* more = reinterpret_cast<const Addition*>(additions);
#pragma omp parallel
  {
    Tiles tiles;
    for (long first = 0; first < rows; first += chunk) {
      const Rows some = as_tiles(normed, std::min(chunk, rows - first), width);
      norm_to_tiles(states + first * width, norm, epsilon, normed, some.rows, width);
      Additions<kAdded> gate_adds(more, to_gate, some, first);
      Additions<kAddedToUp> up_adds(more + to_gate, to_up, some, first);
#pragma omp for
      for (long column = 0; column < inner / kTile; column++) {
        bf16* room = packed ? nullptr : scratch<bf16, kColumns>(2 * kTile * width);
        const bf16* left = gates.column(column, room);
        const bf16* right = ups.column(column, room ? room + kTile * width : nullptr);
        gate_adds.take(column * kTile, inner, false);
        up_adds.take(column * kTile, inner, false);
        const auto add = [&](long row) { gate_adds.add_left(row), up_adds.add_right(row); };
        const Next next = column + 1 < inner / kTile
            ? Next{gates.next(column + 1, column + 1).left, ups.next(column + 1, column + 1).left, gates.column_bytes()}
            : Next{};
        column_pair(some, left, right, next, add, [=](long row, __m512 low, __m512 high) {
          const Floats gated = through_bf16((Floats)silu_of_bf16((__m512)rounded_sum(low))) * rounded_sum(high);
          _mm256_store_si256(
              (__m256i*)in_tiles(active, row, column * kTile, inner), (__m256i)_mm512_cvtneps_pbh((__m512)gated));
        });
      }
      const Rows activated = as_tiles(active, some.rows, inner);
      Additions<kAdded> down_adds(more + to_gate + to_up, to_down, activated, first);
#pragma omp for
      for (long pair = 0; pair < downs.pairs(); pair++)
        product_columns(
            activated, downs, nullptr, states + first * width, out + first * width, pair, down_adds);
    }
  }
}

// Attention of packed rows: query and out (tokens, query heads, width); segments, pieces and sources as above. A query
// sees its own token and those left of it, no more than `window` of them unless that is 0.
void heft_units_attend(
    const bf16* query, const int64_t* segments, const int64_t* pieces, const int64_t* sources, bf16* out,
    long n_segments, long query_heads, long key_value_heads, long width, float scale, long window) {
  const auto* all = reinterpret_cast<const Segment*>(segments);
  const auto* parts = reinterpret_cast<const Piece*>(pieces);
  const auto* from = reinterpret_cast<const Source*>(sources);
  const long group = query_heads / key_value_heads, stride = query_heads * width;
#pragma omp parallel
  {
    Tiles tiles;
    KeysAndValues kept;
#pragma omp for schedule(static) nowait
    for (long task = 0; task < n_segments * query_heads; task++) {
      const Segment& segment = all[task / query_heads];
      const long head = task % query_heads;
      kept.take(segment, parts, from, head / group, width);
      for (long first = 0; first < segment.queries; first += 32) {
        const long rows = std::min<long>(32, segment.queries - first);
        const long offset = (segment.first_query + first) * stride + head * width;
        attend_block(
            query + offset, out + offset, rows, stride, kept.tokens - segment.queries + first, kept, width, scale,
            window);
      }
    }
  }
}

}  // extern "C"

#else

extern "C" int heft_units_ready() { return 0; }

#endif
