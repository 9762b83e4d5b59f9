// What attend() needs from an instruction set: a table of plain functions over one tile of 64 rows. Each file that
// fills a table is compiled for its instruction set, so those files include nothing that could emit shared inline code.
// Internal: not installed.
#pragma once

#include "turboquant/isa.h"
#include "turboquant/layout.h"

#include <cstdint>

namespace turboquant::attention {

// Running softmax of one query head. Scores are in log2 units.
struct RowState {
    float max = 0;      // -inf: nothing seen yet
    float sum = 0;      // of probabilities relative to max
    float skipped = 0;  // upper bound of the probability that was left out as negligible, relative to max
    float code_sum = 0; // of probabilities whose values came from codes; kept only where the values have a mean
    float rescale = 1;  // what the last tile did to max: earlier sums are to be multiplied by it
};

// At most this part of a query head's probability is left out by skipping tiles that cannot matter.
inline constexpr float kNegligible = 1e-6f;

// Head sizes up to here: beyond, 32-bit sums of the integer kernels could overflow.
inline constexpr int kMaxIntHead = 512;

// Levels of a codebook in the forms that kernels look up.
struct LevelTables {
    float level[256] = {};                 // by stored code
    alignas(64) int8_t magnitude[32] = {}; // by the magnitude bits of a sign-magnitude code
    alignas(64) int8_t value[16] = {};     // by stored code, for up to 4 bits
    alignas(64) int8_t decode[3][64] = {}; // the instruction set's own: fill_decode_tables
};

// One 4-channel word of a quantised query, or one 4-row word of quantised probabilities: two dwords whose meaning
// (two byte terms, or two pairs of 16 bits) is the instruction set's own.
struct IntWord {
    int32_t term[2];
};

struct Kernels {
    // ---- float tiles: any bits, any head size -----------------------------------------------------------------------
    // codes of a key tile -> bytes[c*64 + row], c < head_size
    void (*unpack_key)(const TileLayout& tile, const uint8_t* codes, uint8_t* bytes);
    // codes of a value tile -> bytes[row*ld + c], c < head_size rounded up to 16; ld is that size
    void (*unpack_value)(const TileLayout& tile, const uint8_t* codes, uint8_t* bytes, int ld);
    // out[c*64 + row] = level[bytes[c*64 + row]] * scale[row], n channels
    void (*expand_key)(const uint8_t* bytes, int n, const float* level, const float* scale, float* out);
    // out[row*out_ld + c] = level[bytes[row*ld + c]] * scale[row], n channels
    void (*expand_value)(const uint8_t* bytes, int n, int ld, const float* level, const float* scale, float* out,
                         int out_ld);
    // out[col*out_ld + row] = in[row*in_ld + col]
    void (*transpose)(const float* in, int rows, int cols, int in_ld, float* out, int out_ld);
    // c[m][n] = (accumulate ? c : 0) + a[m][k] b[k][n]; n a multiple of 16
    void (*gemm)(const float* a, int lda, const float* b, int ldb, float* c, int ldc, int m, int n, int k,
                 bool accumulate);
    void (*half_to_float)(const uint16_t* in, float* out, int n);
    float (*dot)(const float* a, const float* b, int n);
    void (*axpy)(float a, const float* x, float* y, int n); // y += a x
    void (*scale)(float a, float* y, int n);                // y *= a

    // ---- exact rows: fp16 rows of one head, wherever they lie -------------------------------------------------------
    // s[h*64 + j] = <q[h*q_stride ..], rows[j]> over n channels; up to 64 rows
    void (*exact_scores)(const uint16_t* const* rows, int n_rows, int n, const float* q, int q_stride, int heads,
                         float* s);
    // acc[h*acc_stride + c] += sum over j of p[h*64 + j] * rows[j][c], c < n
    void (*exact_values)(const uint16_t* const* rows, int n_rows, int n, const float* p, int heads, float* acc,
                         int acc_stride);

    // ---- softmax of one query head over one tile --------------------------------------------------------------------
    // s[64]: scores in, probabilities relative to state.max out. score = s + add; with softcap > 0:
    // softcap * tanh(s + add); then + bias_scale * bias[row] (bias may be null; -inf hides). False: nothing to add
    // (hidden, or negligible: accounted for in state.skipped); s is then undefined and state.rescale 1.
    bool (*softmax)(float* s, float add, float softcap, const float* bias, float bias_scale, RowState& state);

    // ---- integer tiles: one rotation block; null where the instruction set has none ---------------------------------
    int max_heads; // query heads that one call takes
    // tables.decode from its other members; once for a codebook, before the functions below.
    void (*fill_decode_tables)(int bits, Side side, LevelTables& tables);
    // q[n] -> words[round_up(n, 32)/4]; q = mul * integer; sum of the integers goes to sum.
    void (*quantise_query)(const float* q, int n, IntWord* words, float* mul, int32_t* sum);
    // s[h*64 + row] = <query h, codes of row> * mul[h] * scales[row]; heads <= max_heads; words of head h at
    // q + h*q_stride. `ahead` bytes behind the tile's end may be prefetched.
    void (*int_scores)(const TileLayout& tile, const LevelTables& tables, const uint8_t* codes, const uint16_t* scales,
                       const IntWord* q, int q_stride, const float* mul, const int32_t* sum, int heads, float* s);
    // p[64] times the value scales -> words[16]; weight = mul * integer; sum of the integers goes to sum.
    void (*quantise_weights)(const float* p, const uint16_t* scales, IntWord* words, float* mul, int32_t* sum);
    // acc[h*acc_stride + c] = acc * rescale[h] + sum over rows of weight * code, c < head_size rounded up to 16.
    // Words of head h at w + h*16.
    void (*int_values)(const TileLayout& tile, const LevelTables& tables, const uint8_t* codes, const IntWord* w,
                       const float* mul, const int32_t* sum, const float* rescale, int heads, float* acc,
                       int acc_stride);
};

const Kernels& portable_kernels();
const Kernels& avx2_kernels();
const Kernels& avxvnni_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512vbmi_kernels();
const Kernels& neon_kernels();

// nullptr: not compiled into this library.
const Kernels* find_kernels(Isa isa);

} // namespace turboquant::attention
