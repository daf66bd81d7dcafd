// Causal attention over packed sequences on AMX: heft::amx_attention. 32 queries of a head at a time.
//
// Scores of a query over all keys that it may see come first, then their softmax, then the weighted values: sums run over
// the keys from the first one on, so that a query's result does not depend on how its sequence is divided into pieces.

#include "amx_tiles.h"

#ifdef HEFT_AMX

#include "torch_args.h"

namespace heft {

namespace {

// The widest head.
constexpr long kWidest = 256;

// Consecutive queries, the last of a sequence whose tokens are `pieces` pieces one after the other.
struct Segment {
  int64_t first_query, queries, first_piece, pieces;
};

// Consecutive tokens of a source.
struct Piece {
  int64_t source, start, tokens;
};

// Keys and values, (tokens, heads, width) each, with their strides in elements.
struct Source {
  const bf16 *keys, *values;
  long key_token, key_head, value_token, value_head;
};

// What the queries of a pass attend to.
struct Sequences {
  const Segment* segments;
  long n_segments;
  const Piece* pieces;
  long n_pieces;
  std::vector<Source> sources;
  long key_value_heads, width;
};

// One key/value head of a segment, gathered from its pieces: keys as [tokens / 16][width / 32] tiles, values as
// [tokens / 32][width / 16] tiles, zero beyond the tokens.
class PackedHead {
 public:
  long tokens = 0;
  const bf16 *keys = nullptr, *values = nullptr;

  // Packs a head unless it is the one packed last.
  void pack(const Sequences& sequences, const Segment& segment, long head) {
    if (&segment == segment_ && head == head_) return;
    segment_ = &segment, head_ = head;
    gather(sequences, segment, head);
    const long padded = long(rows_.size()) / 2, width = sequences.width;
    bf16* to = scratch<bf16, kKeyValues>(2 * padded * width);
    keys = to;
    values = to + padded * width;
    pack_keys(to, padded, width);
    pack_values(to + padded * width, padded, width);
  }

 private:
  // Sets rows_ to the addresses of each token's key, then of each token's value; zeros up to a multiple of 32 tokens.
  void gather(const Sequences& sequences, const Segment& segment, long head) {
    static const bf16 zeros[kWidest] = {};
    const Piece *first = sequences.pieces + segment.first_piece, *last = first + segment.pieces;
    tokens = 0;
    for (const Piece* piece = first; piece < last; piece++) tokens += piece->tokens;
    const long padded = (tokens + 31) / 32 * 32;
    rows_.assign(2 * padded, zeros);
    long token = 0;
    for (const Piece* piece = first; piece < last; piece++) {
      const Source& source = sequences.sources[piece->source];
      for (long t = piece->start; t < piece->start + piece->tokens; t++, token++) {
        rows_[token] = source.keys + t * source.key_token + head * source.key_head;
        rows_[padded + token] = source.values + t * source.value_token + head * source.value_head;
      }
    }
  }

  void pack_keys(bf16* to, long padded, long width) const {
    for (long block = 0; block < padded; block += kTile)
      for (long d = 0; d < width; d += kTileInputs, to += kTileSize) {
        __m512i rows[16];
        for (int r = 0; r < 16; r++) rows[r] = _mm512_loadu_si512(rows_[block + r] + d);
        transpose(rows);
        for (int r = 0; r < 16; r++) _mm512_store_si512(to + r * kTileInputs, rows[r]);
      }
  }

  void pack_values(bf16* to, long padded, long width) const {
    const __m512i first = interleaving(0), second = interleaving(16);
    const bf16* const* value = rows_.data() + padded;
    for (long block = 0; block < padded; block += kTileInputs, to += kTileInputs * width)
      for (long d = 0; d < width; d += kTileInputs)
        for (int pair = 0; pair < 16; pair++) {
          const __m512i even = _mm512_loadu_si512(value[block + 2 * pair] + d);
          const __m512i odd = _mm512_loadu_si512(value[block + 2 * pair + 1] + d);
          bf16* tile = to + d / kTile * kTileSize + pair * kTileInputs;
          _mm512_store_si512(tile, _mm512_permutex2var_epi16(even, first, odd));
          _mm512_store_si512(tile + kTileSize, _mm512_permutex2var_epi16(even, second, odd));
        }
  }

  const Segment* segment_ = nullptr;
  long head_ = -1;
  std::vector<const bf16*> rows_;
};

// One query's shares exp(scale · (score - maximum)) of keys first … last - 1, rounded to bfloat16, zero for the others of
// shares' row. `rate` is scale · log2(e). Returns the reciprocal of their unrounded sum.
float softmax_row(const float* scores, const Activations& shares, long row, long first, long last, __m512 rate) {
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const auto seen = [&](long at) {
    const __m512i index = _mm512_add_epi32(lanes, _mm512_set1_epi32(int(at)));
    return _mm512_cmplt_epi32_mask(index, _mm512_set1_epi32(int(last))) &
           _mm512_cmpge_epi32_mask(index, _mm512_set1_epi32(int(first)));
  };
  const long start = first / kTile * kTile;
  __m512 most = _mm512_set1_ps(-INFINITY);
  for (long at = start; at < last; at += kTile)
    most = _mm512_mask_max_ps(most, seen(at), most, _mm512_loadu_ps(scores + at));
  const __m512 maximum = _mm512_set1_ps(_mm512_reduce_max_ps(most));
  __m512 total = _mm512_setzero_ps();
  for (long at = 0; at < shares.in; at += kTile) {
    __m512 share = _mm512_setzero_ps();
    if (at >= start && at < last) {
      const __m512 power = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + at), maximum), rate);
      share = _mm512_maskz_mov_ps(seen(at), exp2(power));
      total = _mm512_add_ps(total, share);
    }
    _mm256_store_si256((__m256i*)shares.at(row, at), (__m256i)_mm512_cvtneps_pbh(share));
  }
  return 1.0f / _mm512_reduce_add_ps(total);
}

// out = softmax(scale · q·kᵀ)·v of up to 32 consecutive queries of one head, the first at `position` of its sequence; rows
// of out are `stride` elements apart. Scores and sums are FP32, shares bfloat16, the result is rounded once.
void attend_block(
    const Activations& query, long position, const PackedHead& head, bf16* out, long stride, float scale, long window) {
  // Whole blocks of keys, from the first that any query sees.
  const long begin = window ? std::max(0L, position - window + 1) / kBlock * kBlock : 0;
  const long rows = query.rows, width = query.in, keys = (position + rows + kBlock - 1) / kBlock * kBlock - begin;
  // Rows a multiple of a page apart would evict one another from the cache.
  const long score_stride = keys + kTile;
  float* scores = scratch<float, kScores>(kBlock * score_stride);
  for (long k = 0; k < keys; k += kBlock) {
    const bf16* left = head.keys + (begin + k) * width;
    const PanelPair panels{left, left + kTile * width};
    multiply_block(query, 0, panels, 0, width / kTileInputs, {scores + k, score_stride}, false, [] {});
  }
  const Activations shares = scratch_activations<kShares>(rows, keys);
  const __m512 rate = _mm512_set1_ps(scale * 1.44269504088896340736f);
  float reciprocals[kBlock];
  for (long r = 0; r < rows; r++) {
    const long last = position + r + 1 - begin, first = window ? std::max(0L, last - window) : 0;
    reciprocals[r] = softmax_row(scores + r * score_stride, shares, r, first, last, rate);
  }
  alignas(64) float sums[kBlock * kBlock];
  for (long d = 0; d < width; d += kTileInputs) {
    const bf16* left = head.values + begin * width + d / kTile * kTileSize;
    const PanelPair panels{left, left + kTileSize, kTileInputs * width};
    multiply_block(shares, 0, panels, 0, keys / kTileInputs, {sums, kBlock}, false, [] {});
    for (long r = 0; r < rows; r++) {
      const __m512 reciprocal = _mm512_set1_ps(reciprocals[r]);
      const __m512 low = _mm512_mul_ps(_mm512_load_ps(sums + r * kBlock), reciprocal);
      const __m512 high = _mm512_mul_ps(_mm512_load_ps(sums + r * kBlock + kTile), reciprocal);
      _mm512_storeu_si512(out + r * stride + d, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }
}

// query and out (tokens, heads, width); a query sees its own token and those before it in its sequence, `window` in all
// unless that is 0. Queries of no segment are left out.
void run_attention(
    const bf16* query, const Sequences& sequences, bf16* out, long heads, float scale, long window) {
  const long width = sequences.width, stride = heads * width, group = heads / sequences.key_value_heads;
#pragma omp parallel
  {
    TileScope tiles;
    PackedHead packed;
    const Activations room = scratch_activations<kQuery>(kBlock, width);
#pragma omp for schedule(static) nowait
    for (long task = 0; task < sequences.n_segments * heads; task++) {
      const Segment& segment = sequences.segments[task / heads];
      const long head = task % heads;
      packed.pack(sequences, segment, head / group);
      for (long first = 0; first < segment.queries; first += kBlock) {
        const Activations queries = room.slice(0, std::min(kBlock, segment.queries - first));
        const long offset = (segment.first_query + first) * stride + head * width;
        for (long r = 0; r < queries.rows; r++) queries.set_row(r, query + offset + r * stride);
        const long position = packed.tokens - segment.queries + first;
        attend_block(queries, position, packed, out + offset, stride, scale, window);
      }
    }
  }
}

// The rows of an int64 table (n, columns) with a row type.
template <typename Row>
const Row* rows_of(const Tensor& table, const char* name) {
  check(table, {table.dim() ? table.size(0) : 0, sizeof(Row) / sizeof(int64_t)}, name, ScalarType::Long);
  return reinterpret_cast<const Row*>(integers(table));
}

Source source_of(const Tensor& keys, const Tensor& values, int64_t heads, int64_t width) {
  const Shape shape = shape_of(keys);
  STD_TORCH_CHECK(
      shape.size() == 3 && shape[1] == heads && shape[2] == width && shape_of(values) == shape,
      "keys and values must be (tokens, ", heads, ", ", width, ")");
  for (const Tensor& x : {keys, values}) {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "keys and values must be BFloat16");
    STD_TORCH_CHECK(x.stride(2) == 1, "a head's numbers must be contiguous");
  }
  return {data(keys), data(values), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1)};
}

// Pieces must lie in their sources; segments in the queries and pieces, with no more queries than tokens.
void check_sequences(const Sequences& all, const Tensors& keys, int64_t queries) {
  for (const Piece* piece = all.pieces; piece < all.pieces + all.n_pieces; piece++) {
    STD_TORCH_CHECK(piece->source >= 0 && piece->source < long(keys.size()), "a piece is of no source");
    STD_TORCH_CHECK(
        piece->start >= 0 && piece->tokens >= 0 && piece->start + piece->tokens <= keys[piece->source].size(0),
        "a piece must lie within its source");
  }
  for (const Segment* segment = all.segments; segment < all.segments + all.n_segments; segment++) {
    STD_TORCH_CHECK(
        segment->first_query >= 0 && segment->queries > 0 && segment->first_query + segment->queries <= queries &&
            segment->first_piece >= 0 && segment->pieces >= 0 &&
            segment->first_piece + segment->pieces <= all.n_pieces,
        "a segment must lie within the queries and pieces");
    long tokens = 0;
    for (long i = 0; i < segment->pieces; i++) tokens += all.pieces[segment->first_piece + i].tokens;
    STD_TORCH_CHECK(segment->queries <= tokens, "a segment has more queries than tokens");
  }
}

// segments (n, 4) and pieces (n, 3): rows of Segment and of Piece. Source i has the tokens of keys[i] and values[i].
Tensor amx_attention(
    const Tensor& input, const Tensors& keys, const Tensors& values, const Tensor& segments, const Tensor& pieces,
    std::optional<double> scale, std::optional<int64_t> window) {
  STD_TORCH_CHECK(input.dim() == 3 && !keys.empty() && keys[0].dim() == 3, "query must be (tokens, heads, width)");
  STD_TORCH_CHECK(keys.size() == values.size(), "keys and values must be as many");
  STD_TORCH_CHECK(!window || *window > 0, "window must be positive");
  const Tensor query = contiguous_rows(input);
  const int64_t tokens = query.size(0), heads = query.size(1), width = query.size(2), kv_heads = keys[0].size(1);
  STD_TORCH_CHECK(width % kTileInputs == 0 && width <= kWidest, "a head must be 32 · n wide, up to ", kWidest);
  STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "heads must be a multiple of key/value heads");
  Sequences sequences{
      rows_of<Segment>(segments, "segments"), segments.size(0), rows_of<Piece>(pieces, "pieces"), pieces.size(0), {},
      kv_heads, width};
  for (size_t i = 0; i < keys.size(); i++) sequences.sources.push_back(source_of(keys[i], values[i], kv_heads, width));
  check_sequences(sequences, keys, tokens);
  Tensor out = torch::stable::empty_like(query);
  const double rate = scale ? *scale : 1 / std::sqrt(double(width));
  run_attention(data(query), sequences, output(out), heads, float(rate), window.value_or(0));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(HEFT_NAMESPACE, m) {
  m.def(
      "amx_attention(Tensor query, Tensor[] keys, Tensor[] values, Tensor segments, Tensor pieces, float? scale, "
      "int? window) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(HEFT_NAMESPACE, CPU, m) { m.impl("amx_attention", TORCH_BOX(&amx_attention)); }

}  // namespace heft

#endif
