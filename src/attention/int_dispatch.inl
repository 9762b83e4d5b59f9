// From run-time bits and heads to the instance of the integer kernels: scores<Bits, Heads> and values<Bits, Heads> of
// the including file. Included once per instruction set, inside an anonymous namespace.

template <int Bits, class... Args>
inline void scores_of_heads(int heads, const Args&... args) {
    switch (heads) {
    case 1: return scores<Bits, 1>(args...);
    case 2: return scores<Bits, 2>(args...);
    case 3: return scores<Bits, 3>(args...);
    case 4: return scores<Bits, 4>(args...);
    case 5: return scores<Bits, 5>(args...);
    case 6: return scores<Bits, 6>(args...);
    case 7: return scores<Bits, 7>(args...);
    default: return scores<Bits, 8>(args...);
    }
}

template <int Bits, class... Args>
inline void values_of_heads(int heads, const Args&... args) {
    switch (heads) {
    case 1: return values<Bits, 1>(args...);
    case 2: return values<Bits, 2>(args...);
    case 3: return values<Bits, 3>(args...);
    case 4: return values<Bits, 4>(args...);
    case 5: return values<Bits, 5>(args...);
    case 6: return values<Bits, 6>(args...);
    case 7: return values<Bits, 7>(args...);
    default: return values<Bits, 8>(args...);
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

void int_values(const TileLayout& tile, const LevelTables& tables, const uint8_t* codes, const IntWord* w, const float* mul,
                const int32_t* sum, const float* rescale, int heads, float* acc, int acc_stride) {
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
    k.quantise_query = quantise_query;
    k.int_scores = int_scores;
    k.quantise_weights = quantise_weights;
    k.int_values = int_values;
    return k;
}
