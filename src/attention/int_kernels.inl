// The integer kernels, one source for every instruction set that has them: scores and values of one tile, the query
// and the weights as integers. Included once per instruction set, inside an anonymous namespace, after
//
//   kVectorBytes                  of a vector of codes: 64, 32 or 16; a 32-bit lane is a row (keys) or a channel (values)
//   Bytes                         that vector; & | ^ work on it
//   load_bytes, splat_byte, load_table16 (16 bytes in every 128-bit lane), add_bytes, subtract_bytes,
//   shift_right<N>, shift_left<N> (what crosses a byte's border is masked off later), choose(mask, a, b) (bitwise),
//   lookup(table, index), pick<BIT>(bits, set, clear) (byte by byte)
//   kKeyOffset, kValueOffset      what codes have added to them before they are multiplied
//   kLargestQuery, kLargestWeight the integers' range
//   Codes, operand(Bytes)         what the dot product takes of a vector of codes
//   Word, word(IntWord)           the other factor, the same in every lane
//   Sum, dot_key, dot_value       sums of products; total(Sum) is the 32-bit result
//   kDecodeFirst                  two planes are decoded to memory first: codes, tables and sums do not fit together
//   vectors_at_once(heads)        that share the words' broadcasts, a power of two, as the registers allow
//   round_to_ints, load_halves    kWidth floats; kWidth is kVectorBytes / 4
//   store_query_words, store_weight_words(Vi (&)[2], IntWord*)
//
// and a file of decoders.

// Sums must stay in registers: a call between them and the loops would put them into memory.
#define TQ_INLINE inline __attribute__((always_inline))

static_assert(kWidth * 4 == kVectorBytes);
constexpr int kGroupBytes = 2 * kLineBytes; // of a key plane: 32 rows
constexpr int kGroupVectors = kGroupBytes / kVectorBytes;
constexpr int kLineVectors = kLineBytes / kVectorBytes;
constexpr int kMostWords = kMaxIntHead / 4;

// Sums of integers rounded from floats. What is not finite rounds to INT32_MIN (and its factor is NaN): those sums wrap.
using Vu = uint32_t __attribute__((vector_size(kVectorBytes)));
inline int32_t lane_total(Vu v) {
    uint32_t lanes[kWidth];
    __builtin_memcpy(lanes, &v, sizeof lanes);
    uint32_t s = 0;
    for (uint32_t x : lanes) {
        s += x;
    }
    return static_cast<int32_t>(s);
}

// Where vector j of several lies: `INNER` of them side by side, then `outer` bytes on.
template <int INNER>
inline const uint8_t* vector_at(const uint8_t* first, int j, int64_t outer) {
    return first + j / INNER * outer + j % INNER * kVectorBytes;
}

// How far ahead lines are prefetched: whole tiles, so that each stream of a tile asks for its own lines, and far enough
// for memory to answer (docs/kernels.md).
inline int64_t prefetch_distance(const TileLayout& tile) {
    constexpr int64_t kLeast = 3072;
    const int64_t bytes = static_cast<int64_t>(tile.tile_bytes);
    int64_t distance = bytes;
    while (distance < kLeast) {
        distance += bytes;
    }
    return distance;
}

// Once a line; j: which of the vectors beside each other `at` is.
TQ_INLINE void prefetch_line(const uint8_t* at, int j, int64_t distance) {
    if (j * kVectorBytes % kLineBytes == 0) {
        __builtin_prefetch(at + distance);
    }
}

enum class Factor { query, weights };

template <Factor FACTOR>
inline void dot(Sum& sum, const Codes& codes, const Word& factor) {
    if constexpr (FACTOR == Factor::query) {
        dot_key(sum, codes, factor);
    } else {
        dot_value(sum, codes, factor);
    }
}

// One word of each head against N vectors of codes.
template <Factor FACTOR, int HEADS, int N>
TQ_INLINE void dot_words(const Codes (&codes)[N], const IntWord* words, int words_stride, Sum (&sums)[N][HEADS]) {
    for (int h = 0; h < HEADS; ++h) {
        const Word w = word(words[h * words_stride]);
        for (int j = 0; j < N; ++j) {
            dot<FACTOR>(sums[j][h], codes[j], w);
        }
    }
}

// Fields F and following of one line.
template <class D, Factor FACTOR, int SUB, int F, int HEADS, int N>
TQ_INLINE void dot_fields(const D& decoder, const typename D::Line (&lines)[N], const IntWord* words, int words_stride,
                          Sum (&sums)[N][HEADS]) {
    Codes codes[N];
    for (int j = 0; j < N; ++j) {
        codes[j] = operand(decoder.template get<SUB, F>(lines[j]));
    }
    dot_words<FACTOR>(codes, words + F, words_stride, sums);
    if constexpr (F + 1 < D::kFields) {
        dot_fields<D, FACTOR, SUB, F + 1>(decoder, lines, words, words_stride, sums);
    }
}

struct Streams {
    const uint8_t* low; // the first plane's
    const uint8_t* high;
    int64_t low_outer;
    int64_t high_outer;
    int64_t ahead; // prefetched
    int stride;    // bytes between groups
};

// Lines SUB and following of those that share one line of the second plane.
template <class D, Factor FACTOR, int INNER, int SUB, int HEADS, int N>
TQ_INLINE void dot_lines(const D& decoder, const Streams& s, const Bytes (&upper)[N], int group, int groups,
                         const IntWord* words, int words_stride, Sum (&sums)[N][HEADS]) {
    if (SUB > 0 && group + SUB >= groups) {
        return;
    }
    typename D::Line lines[N];
    for (int j = 0; j < N; ++j) {
        const uint8_t* at = vector_at<INNER>(s.low + (group + SUB) * s.stride, j, s.low_outer);
        if constexpr (!requires { D::kInCache; }) {
            prefetch_line(at, j, s.ahead);
        }
        lines[j] = decoder.template line<SUB>(load_bytes(at), upper[j]);
    }
    dot_fields<D, FACTOR, SUB, 0>(decoder, lines, words + (group + SUB) * D::kFields, words_stride, sums);
    if constexpr (SUB + 1 < D::kRatio) {
        dot_lines<D, FACTOR, INNER, SUB + 1>(decoder, s, upper, group, groups, words, words_stride, sums);
    }
}

// As dot_lines, but the fields go to `out`.
template <class D, int INNER, int SUB, int N>
TQ_INLINE void decode_lines(const D& decoder, const Streams& s, const Bytes (&upper)[N], int group, int groups,
                            Bytes (*out)[N]) {
    if (SUB > 0 && group + SUB >= groups) {
        return;
    }
    for (int j = 0; j < N; ++j) {
        const uint8_t* at = vector_at<INNER>(s.low + (group + SUB) * s.stride, j, s.low_outer);
        prefetch_line(at, j, s.ahead);
        const typename D::Line line = decoder.template line<SUB>(load_bytes(at), upper[j]);
        out[SUB * D::kFields][j] = decoder.template get<SUB, 0>(line);
        out[SUB * D::kFields + 1][j] = decoder.template get<SUB, 1>(line);
        if constexpr (D::kFields == 4) {
            out[SUB * D::kFields + 2][j] = decoder.template get<SUB, 2>(line);
            out[SUB * D::kFields + 3][j] = decoder.template get<SUB, 3>(line);
        }
    }
    if constexpr (SUB + 1 < D::kRatio) {
        decode_lines<D, INNER, SUB + 1>(decoder, s, upper, group, groups, out);
    }
}

template <class D, int INNER, int N>
TQ_INLINE void load_upper(const Streams& s, int group, Bytes (&upper)[N]) {
    for (int j = 0; j < N && D::kRatio > 1; ++j) {
        const uint8_t* at = vector_at<INNER>(s.high + group / D::kRatio * s.stride, j, s.high_outer);
        prefetch_line(at, j, s.ahead);
        upper[j] = load_bytes(at);
    }
}

// Bytes that are decoded already.
struct Decoded {
    static constexpr bool kInCache = true;
    static constexpr int kFields = 1, kRatio = 1;
    using Line = Bytes;
    template <int SUB>
    Line line(Bytes bytes, Bytes) const {
        return bytes;
    }
    template <int SUB, int F>
    Bytes get(Line bytes) const {
        return bytes;
    }
};

// Sums over all groups for N vectors of lanes and HEADS heads.
template <class D, Factor FACTOR, int INNER, int HEADS, int N>
TQ_INLINE void dot_groups(const D& decoder, const Streams& s, int groups, const IntWord* words, int words_stride,
                          Sum (&sums)[N][HEADS]) {
    if constexpr (D::kRatio > 1 && kDecodeFirst) {
        Bytes decoded[kMostWords][N];
        for (int group = 0; group < groups; group += D::kRatio) {
            Bytes upper[N] = {};
            load_upper<D, INNER>(s, group, upper);
            decode_lines<D, INNER, 0>(decoder, s, upper, group, groups, decoded + group * D::kFields);
        }
        const Streams bytes = {reinterpret_cast<const uint8_t*>(decoded), nullptr, 0, 0, 0, N * kVectorBytes};
        dot_groups<Decoded, FACTOR, N>(Decoded{}, bytes, groups * D::kFields, words, words_stride, sums);
    } else {
        for (int group = 0; group < groups; group += D::kRatio) {
            Bytes upper[N] = {};
            load_upper<D, INNER>(s, group, upper);
            dot_lines<D, FACTOR, INNER, 0>(decoder, s, upper, group, groups, words, words_stride, sums);
        }
    }
}

template <int BITS, int HEADS>
void scores(const TileLayout& tile, const LevelTables& tables, const uint8_t* codes, const uint16_t* scales,
            const IntWord* q, int q_stride, const float* mul, const int32_t* sum, float* s) {
    using D = Decoder<BITS>;
    constexpr int kN = vectors_at_once(HEADS);
    const D decoder(tables, kKeyOffset);
    const int groups = tile.planes[0].padded_channels / (4 * D::kFields);
    const int high_groups = tile.n_planes > 1 ? tile.planes[1].padded_channels / (4 * D::kFields * D::kRatio) : 0;
    const int64_t ahead = prefetch_distance(tile);
    const int64_t low_half = static_cast<int64_t>(groups) * kGroupBytes;
    const int64_t high_half = static_cast<int64_t>(high_groups) * kGroupBytes;
    for (int v = 0; v < 2 * kGroupVectors; v += kN) {
        const Streams streams = {vector_at<kGroupVectors>(codes, v, low_half),
                                 vector_at<kGroupVectors>(codes + tile.planes[1].offset, v, high_half),
                                 low_half,
                                 high_half,
                                 ahead,
                                 kGroupBytes};
        Sum sums[kN][HEADS] = {};
        dot_groups<D, Factor::query, kGroupVectors>(decoder, streams, groups, q, q_stride, sums);
        for (int j = 0; j < kN; ++j) {
            const int row = (v + j) * kWidth;
            const Vf scale = load_halves(scales + row);
            for (int h = 0; h < HEADS; ++h) {
                Vi total_h = total(sums[j][h]);
                if (kKeyOffset != 0) {
                    total_h -= static_cast<int32_t>(static_cast<uint32_t>(sum[h]) * static_cast<uint32_t>(kKeyOffset));
                }
                store(s + h * kTileRows + row, __builtin_convertvector(total_h, Vf) * (scale * mul[h]));
            }
        }
    }
}

// Vectors of channels from v on, N at once as long as there are N.
template <int BITS, int HEADS, int N>
inline void value_vectors(const Decoder<BITS>& decoder, const TileLayout& tile, const uint8_t* codes, const IntWord* w,
                          const float* mul, const int32_t* sum, const float* rescale, float* acc, int acc_stride,
                          int v) {
    using D = Decoder<BITS>;
    constexpr int kGroups = kTileRows / (4 * D::kFields);
    constexpr int kLow = kGroups * kLineBytes; // of 16 channels
    constexpr int kHigh = D::kRatio == 1 ? 0 : kLow / D::kRatio;
    const int vectors = tile.planes[0].padded_channels / kWidth;
    const int64_t ahead = prefetch_distance(tile);
    for (; v + N <= vectors; v += N) {
        const Streams streams = {vector_at<kLineVectors>(codes, v, kLow),
                                 vector_at<kLineVectors>(codes + tile.planes[1].offset, v, kHigh),
                                 kLow,
                                 kHigh,
                                 ahead,
                                 kLineBytes};
        Sum sums[N][HEADS] = {};
        dot_groups<D, Factor::weights, kLineVectors>(decoder, streams, kGroups, w, kTileRows / 4, sums);
        for (int h = 0; h < HEADS; ++h) {
            for (int j = 0; j < N; ++j) {
                Vi total_h = total(sums[j][h]);
                if (kValueOffset != 0) {
                    total_h -=
                        static_cast<int32_t>(static_cast<uint32_t>(sum[h]) * static_cast<uint32_t>(kValueOffset));
                }
                float* to = acc + h * acc_stride + (v + j) * kWidth;
                store(to, load(to) * rescale[h] + __builtin_convertvector(total_h, Vf) * mul[h]);
            }
        }
    }
    if constexpr (N > 1) {
        if (v < vectors) {
            value_vectors<BITS, HEADS, N / 2>(decoder, tile, codes, w, mul, sum, rescale, acc, acc_stride, v);
        }
    }
}

template <int BITS, int HEADS>
void values(const TileLayout& tile, const LevelTables& tables, const uint8_t* codes, const IntWord* w, const float* mul,
            const int32_t* sum, const float* rescale, float* acc, int acc_stride) {
    constexpr int kN = vectors_at_once(HEADS);
    const Decoder<BITS> decoder(tables, kValueOffset);
    value_vectors<BITS, HEADS, kN>(decoder, tile, codes, w, mul, sum, rescale, acc, acc_stride, 0);
}

// ---- quantisation ----------------------------------------------------------------------------------------------------

void quantise_query(const float* q, int n, IntWord* words, float* mul, int32_t* sum) {
    Vf top{};
    Vf poison{}; // NaN where something is not finite: it must reach the output
    for (int c = 0; c < n; c += kWidth) {
        const Vf x = load(q + c);
        top = vmax(top, vmax(x, -x));
        poison += x * 0.0f;
    }
    const float largest = lane_max(top);
    const float factor = largest > 0 ? kLargestQuery / largest : 0.0f;
    Vu total_q{};
    for (int c = 0; c < n; c += 2 * kWidth) {
        const Vi v[2] = {round_to_ints(load(q + c) * factor),
                         c + kWidth < n ? round_to_ints(load(q + c + kWidth) * factor) : Vi{}};
        total_q += reinterpret_cast<Vu>(v[0]) + reinterpret_cast<Vu>(v[1]);
        store_query_words(v, words + c / 4);
    }
    for (int w = round_up(n, 2 * kWidth) / 4; w < round_up(n, 32) / 4; ++w) {
        words[w] = {};
    }
    *sum = lane_total(total_q);
    *mul = largest / kLargestQuery + lane_sum(poison);
}

void quantise_weights(const float* p, const uint16_t* scales, IntWord* words, float* mul, int32_t* sum) {
    Vf w[kTileRows / kWidth];
    Vf top{};
    for (int i = 0; i < kTileRows / kWidth; ++i) {
        w[i] = load(p + i * kWidth) * load_halves(scales + i * kWidth);
        top = vmax(top, w[i]);
    }
    const float largest = lane_max(top);
    const float factor = largest > 0 ? kLargestWeight / largest : 0.0f;
    Vu total_w{};
    for (int i = 0; i < kTileRows / kWidth; i += 2) {
        const Vi v[2] = {round_to_ints(w[i] * factor), round_to_ints(w[i + 1] * factor)};
        total_w += reinterpret_cast<Vu>(v[0]) + reinterpret_cast<Vu>(v[1]);
        store_weight_words(v, words + i * kWidth / 4);
    }
    *mul = largest / kLargestWeight;
    *sum = kValueOffset == 0 ? 0 : lane_total(total_w); // without an offset there is nothing to repay
}

// ---- from run-time bits and heads to an instance ---------------------------------------------------------------------

void fill_decode_tables(int bits, Side side, LevelTables& tables) {
    const int offset = side == Side::key ? kKeyOffset : kValueOffset;
    switch (bits) {
    case 2: return Decoder<2>::fill(tables, offset);
    case 3: return Decoder<3>::fill(tables, offset);
    case 4: return Decoder<4>::fill(tables, offset);
    case 5: return Decoder<5>::fill(tables, offset);
    case 6: return Decoder<6>::fill(tables, offset);
    default: return Decoder<8>::fill(tables, offset);
    }
}

template <int BITS, class... Args>
inline void scores_of_heads(int heads, const Args&... args) {
    switch (heads) {
    case 1: return scores<BITS, 1>(args...);
    case 2: return scores<BITS, 2>(args...);
    case 3: return scores<BITS, 3>(args...);
    case 4: return scores<BITS, 4>(args...);
    case 5: return scores<BITS, 5>(args...);
    case 6: return scores<BITS, 6>(args...);
    case 7: return scores<BITS, 7>(args...);
    default: return scores<BITS, 8>(args...);
    }
}

template <int BITS, class... Args>
inline void values_of_heads(int heads, const Args&... args) {
    switch (heads) {
    case 1: return values<BITS, 1>(args...);
    case 2: return values<BITS, 2>(args...);
    case 3: return values<BITS, 3>(args...);
    case 4: return values<BITS, 4>(args...);
    case 5: return values<BITS, 5>(args...);
    case 6: return values<BITS, 6>(args...);
    case 7: return values<BITS, 7>(args...);
    default: return values<BITS, 8>(args...);
    }
}

void int_scores(const TileLayout& tile, const LevelTables& tables, const uint8_t* codes, const uint16_t* scales,
                const IntWord* q, int q_stride, const float* mul, const int32_t* sum, int heads, float* s) {
    switch (tile.bits) {
    case 2: return scores_of_heads<2>(heads, tile, tables, codes, scales, q, q_stride, mul, sum, s);
    case 3: return scores_of_heads<3>(heads, tile, tables, codes, scales, q, q_stride, mul, sum, s);
    case 4: return scores_of_heads<4>(heads, tile, tables, codes, scales, q, q_stride, mul, sum, s);
    case 5: return scores_of_heads<5>(heads, tile, tables, codes, scales, q, q_stride, mul, sum, s);
    case 6: return scores_of_heads<6>(heads, tile, tables, codes, scales, q, q_stride, mul, sum, s);
    default: return scores_of_heads<8>(heads, tile, tables, codes, scales, q, q_stride, mul, sum, s);
    }
}

void int_values(const TileLayout& tile, const LevelTables& tables, const uint8_t* codes, const IntWord* w,
                const float* mul, const int32_t* sum, const float* rescale, int heads, float* acc, int acc_stride) {
    switch (tile.bits) {
    case 2: return values_of_heads<2>(heads, tile, tables, codes, w, mul, sum, rescale, acc, acc_stride);
    case 3: return values_of_heads<3>(heads, tile, tables, codes, w, mul, sum, rescale, acc, acc_stride);
    case 4: return values_of_heads<4>(heads, tile, tables, codes, w, mul, sum, rescale, acc, acc_stride);
    case 5: return values_of_heads<5>(heads, tile, tables, codes, w, mul, sum, rescale, acc, acc_stride);
    case 6: return values_of_heads<6>(heads, tile, tables, codes, w, mul, sum, rescale, acc, acc_stride);
    default: return values_of_heads<8>(heads, tile, tables, codes, w, mul, sum, rescale, acc, acc_stride);
    }
}

constexpr Kernels all_kernels() {
    Kernels k = float_kernels();
    k.max_heads = kMostHeads;
    k.fill_decode_tables = fill_decode_tables;
    k.quantise_query = quantise_query;
    k.int_scores = int_scores;
    k.quantise_weights = quantise_weights;
    k.int_values = int_values;
    return k;
}
