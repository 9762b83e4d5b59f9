// The flash loop over images (prefill.h): a block takes 128 (query, head) rows of an item, eight warps 16 rows each, a
// ninth warp copies tiles of images into a ring. Internal.
//
// Two ways to the tensor cores over the same shared memory and the same fragments: Hopper's warpgroup products (four
// warps, operands read from shared memory behind the program's back), else mma.m16n8k16.
#pragma once

#include "cuda/device.cuh"
#include "cuda/prefill.h"
#include "cuda/prefill_extent.cuh"
#include "cuda/wgmma.cuh"

namespace turboquant::cuda {

inline constexpr int kFlashWarps = 8;
// Hopper: three warpgroups, so that the third can give its registers to the other two.
constexpr int flash_threads(bool warpgroups) {
    return (kFlashWarps + (warpgroups ? 4 : 1)) * 32;
}

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffU, x, 1);
    return x + __shfl_xor_sync(0xffffffffU, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffU, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffU, x, 2));
}
__device__ __forceinline__ uint32_t half_pair(float low, float high) {
    const __half2 h = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(h);
}

// ---- products ------------------------------------------------------------------------------------------------------
// Fragments: sum[4 n + i], n an 8-column tile, i / 2 row g or g + 8, column 8 n + 2 t + i % 2.

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void mma_half(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <bool WARPGROUPS>
struct Products;

// D channels, N tokens of a tile. Addresses: shared memory, operands of 128-byte rows swizzled as prefill.h says.
template <>
struct Products<false> {
    // The 16 rows at row0 of an operand of 16-bit elements: matrices (rows 0-7, 8-15) x (chunks c, c + 1).
    __device__ __forceinline__ static void rows16(uint32_t (&r)[4], uint32_t operand, int row0, int chunk, int lane) {
        const int row = row0 + lane % 16;
        load_matrices(r, operand + row * 128 + (((chunk + lane / 16) ^ (row & 7)) << 4));
    }
    // s = q k^T. q: this warpgroup's 64 rows, [D / 64] operands; k: [D / 64] operands of N rows.
    template <int D, int N>
    __device__ __forceinline__ static void scores(float (&s)[N / 2], uint32_t q, uint32_t k, int warp, int lane) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            s[i] = 0;
        }
#pragma unroll
        for (int step = 0; step < D / 16; ++step) {
            uint32_t a[4];
            rows16(a, q + step / 4 * (64 * 128), warp % 4 * 16, step % 4 * 2, lane);
#pragma unroll
            for (int n = 0; n < N / 16; ++n) {
                uint32_t b[4];
                rows16(b, k + step / 4 * (N * 128), n * 16, step % 4 * 2, lane);
                mma_half(s + 8 * n, a, b[0], b[2]);
                mma_half(s + 8 * n + 4, a, b[1], b[3]);
            }
        }
    }
    // o += p v. v: [N / 64] operands of D rows.
    template <int D, int N>
    __device__ __forceinline__ static void values(float (&o)[D / 2], const uint32_t (&p)[N / 16][4], uint32_t v,
                                                  int lane) {
#pragma unroll
        for (int step = 0; step < N / 16; ++step) {
#pragma unroll
            for (int n = 0; n < D / 16; ++n) {
                uint32_t b[4];
                rows16(b, v + step / 4 * (D * 128), n * 16, step % 4 * 2, lane);
                mma_half(o + 8 * n, p[step], b[0], b[2]);
                mma_half(o + 8 * n + 4, p[step], b[1], b[3]);
            }
        }
    }
    template <int A, int B>
    __device__ __forceinline__ static void wait(float (&)[A], float (&)[B]) {}
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
template <>
struct Products<true> {
    template <int D, int N>
    __device__ __forceinline__ static void scores(float (&s)[N / 2], uint32_t q, uint32_t k, int, int) {
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < D / 16; ++step) {
            wgmma_shared(s, wgmma_operand(q + step / 4 * (64 * 128) + step % 4 * 32),
                         wgmma_operand(k + step / 4 * (N * 128) + step % 4 * 32), step == 0 ? 0 : 1);
        }
        wgmma_commit();
    }
    template <int D, int N>
    __device__ __forceinline__ static void values(float (&o)[D / 2], const uint32_t (&p)[N / 16][4], uint32_t v, int) {
        wgmma_pin(o);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < N / 16; ++step) {
            wgmma_add(o, p[step], wgmma_operand(v + step / 4 * (D * 128) + step % 4 * 32));
        }
        wgmma_commit();
    }
    template <int A, int B>
    __device__ __forceinline__ static void wait(float (&s)[A], float (&o)[B]) {
        wgmma_wait();
        wgmma_pin(s);
        wgmma_pin(o);
    }
};
#endif

// ---- the loop ------------------------------------------------------------------------------------------------------

template <int D, int N, int STAGES, bool WARPGROUPS>
struct Flash {
    static constexpr int kQueryBytes = kPrefillRows * D * 2;
    static constexpr int kStageBytes = 2 * N * D * 2;
    static constexpr int kPieceBytes = kImageTokens * 128;
    static constexpr int kPieces = kStageBytes / kPieceBytes;
    static constexpr int kAlignment = 1024; // of a swizzle atom
    static constexpr int kSharedBytes =
        kAlignment + kQueryBytes + STAGES * kStageBytes + kPrefillRows * 8 + 2 * STAGES * 8;
    static constexpr float kNorm = D == 64 ? 0.125F : D == 128 ? 0.08838834764831845F : 0.0625F; // 1 / sqrt(D)

    using P = Products<WARPGROUPS>;

    const PrefillArgs& a;
    const Extent e;
    const int item, split, b, head;
    int first_row, last_query, first_query;              // of this block
    int code_begin, code_tiles, sink_tiles, window_tile; // tiles of N tokens
    int first_tile, n;                                   // of all tiles, this block's
    uint8_t* queries;
    uint8_t* ring;
    float2* units; // [row]: what scores are multiplied with, and what is added
    uint64_t* full;
    uint64_t* empty;

    __device__ __forceinline__ int end_of(int query) const {
        return a.causal != 0 ? e.length - a.q_len + 1 + query : e.length;
    }

    // item_: of the launch.
    __device__ __forceinline__ Flash(const PrefillArgs& args, uint8_t* shared, int item_, int query_block, int split_)
        : a(args),
          e(args, (args.first_item + item_) / args.kv_heads),
          item(item_),
          split(split_),
          b((args.first_item + item_) / args.kv_heads),
          head((args.first_item + item_) % args.kv_heads) {
        const uint32_t at = shared_address(shared);
        queries = shared + ((at + kAlignment - 1) / kAlignment * kAlignment - at);
        ring = queries + kQueryBytes;
        units = reinterpret_cast<float2*>(ring + STAGES * kStageBytes);
        full = reinterpret_cast<uint64_t*>(units + kPrefillRows);
        empty = full + STAGES;
        first_row = query_block * kPrefillRows;
        first_query = query_of(first_row);
        last_query = min(query_of(first_row + kPrefillRows - 1), a.q_len - 1);
        // What its rows see: codes, then exact rows: sinks and the window, where tiles between them are left out.
        const int first_end = end_of(first_query);
        const int last_end = end_of(last_query);
        const int code_end = e.code_end(a, last_end);
        code_begin = e.lowest(a, first_end) / N;
        code_tiles = code_end > e.lowest(a, first_end) ? (code_end + N - 1) / N - code_begin : 0;
        sink_tiles = last_end > 0 && e.lowest(a, first_end) < e.n_sinks ? (e.n_sinks + N - 1) / N : 0;
        const int window_from = max(max(e.exact_from(a, first_end), e.lowest(a, first_end)), e.window_begin);
        window_tile = sink_tiles;
        int window_end = sink_tiles;
        if (a.window > 0 && window_from < last_end) {
            window_tile = max(sink_tiles, (e.n_sinks + window_from - e.window_begin) / N);
            window_end = (e.n_sinks + last_end - e.window_begin + N - 1) / N;
        }
        const int all = code_tiles + sink_tiles + max(window_end - window_tile, 0);
        first_tile = all * split / a.splits;
        n = all * (split + 1) / a.splits - first_tile;
    }

    // Tile j: of codes (its number), or of exact rows (bit-complement of its number).
    __device__ __forceinline__ int tile(int j) const {
        if (j < code_tiles) {
            return code_begin + j;
        }
        j -= code_tiles;
        return ~(j < sink_tiles ? j : window_tile + j - sink_tiles);
    }

    // The ninth warp.
    __device__ __forceinline__ void copy_tiles(int lane) const {
        constexpr int kImages = N / kImageTokens;
        constexpr int kHalves = D / 64;
        const int64_t image = 2 * D * 128;
        const uint8_t* const images = a.images + static_cast<int64_t>(item) * (a.code_images + a.exact_images) * image;
        // Lane i copies piece i: keys [half][image], values [image][part].
        const int of_value = lane - kPieces / 2;
        const int64_t offset = lane < kPieces / 2
                                   ? lane % kImages * image + lane / kImages * kPieceBytes
                                   : of_value / kHalves * image + D * 128 + of_value % kHalves * kPieceBytes;
        int stage = 0;
        uint32_t parity = 1; // a ring that nobody has filled counts as read
        for (int j = 0; j < n; ++j) {
            barrier_wait(empty + stage, parity);
            const int at = tile(first_tile + j);
            const int64_t first = at >= 0 ? int64_t{at} * kImages : int64_t{~at} * kImages + a.code_images;
            copy_begin(full + stage, kStageBytes, lane);
            copy_pieces(full + stage, ring + stage * kStageBytes, images + first * image + offset, kPieceBytes, kPieces,
                        lane);
            if (++stage == STAGES) {
                stage = 0;
                parity ^= 1U;
            }
        }
    }

    // ---- what follows: a warp's 16 rows; lane 4 g + t has rows g and g + 8 ----

    struct RowState {
        float scale; // of sums, into units of log2 (with soft-cap: of its argument)
        float bias;  // q . mu, likewise
        float largest;
        float sum;     // of this lane's columns
        int end;       // tokens that the query sees
        int code_from; // of them, those seen as codes
        int code_end;
        const float* offsets; // of this row's scores, one for 256 positions; null: `bias` for all
    };

    // ---- rotations: eight lanes take a row, lane u of them channels 64 h + 8 u + (0..7), a warp four rows at a time, in
    // loops: a block runs this once, and fetching instructions that run once took longer than running them ----

    static constexpr int kOwn = D / 8; // channels of a lane
    struct Raw {                       // as they lie in memory, 16 bytes at a time
        uint4 v[D / 64 * 2];           // of 16-bit types the first half
    };

    // y = H y; not divided by sqrt(D), which goes into factors elsewhere.
    __device__ __forceinline__ static void hadamard(float (&y)[kOwn], int u) {
#pragma unroll
        for (int h = 1; h < kOwn; h *= 2) { // bits 0 to 2 of the channel, and those from 6 on
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
                if ((i & h) == 0) {
                    const float p = y[i];
                    const float q = y[i + h];
                    y[i] = p + q;
                    y[i + h] = p - q;
                }
            }
        }
#pragma unroll 1
        for (int h = 1; h < 8; h *= 2) {
            const float sign = (u & h) != 0 ? -1.0F : 1.0F;
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
                y[i] = fmaf(y[i], sign, __shfl_xor_sync(0xffffffffU, y[i], h));
            }
        }
    }

    // Bit i: this lane's channel i is negated.
    __device__ __forceinline__ uint32_t own_signs(int u) const {
        uint32_t signs = 0;
#pragma unroll
        for (int h = 0; h < D / 64; ++h) {
            signs |= (a.signs[2 * h + u / 4] >> (u % 4 * 8) & 0xffU) << (8 * h);
        }
        return signs;
    }
    __device__ __forceinline__ static void flip(float (&y)[kOwn], uint32_t signs) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            y[i] = __uint_as_float(__float_as_uint(y[i]) ^ (signs << (31 - i) & 0x80000000U));
        }
    }

    __device__ __forceinline__ int query_of(int r) const { // r / group
        return a.group == 1 ? r : static_cast<int>(__umulhi(r, a.group_inverse));
    }

    // Channels 64 h + 8 u on of the query of a row of the block; zeros behind the last.
    __device__ __forceinline__ void load_query(Raw& raw, int row, int u) const {
        const int r = first_row + row;
        const int query = query_of(r);
        const int64_t at =
            b * a.q_batch + query * a.q_query + (head * a.group + r - query * a.group) * a.q_head + 8 * u;
        const bool real = query < a.q_len;
#pragma unroll
        for (int i = 0; i < D / 64 * 2; ++i) {
            raw.v[i] = uint4{0, 0, 0, 0};
        }
        if (!real) {
            return;
        }
        if (a.type == 0) {
            const float* const from = static_cast<const float*>(a.q) + at;
#pragma unroll
            for (int i = 0; i < D / 64 * 2; ++i) {
                raw.v[i] = load_16<float>(from + i / 2 * 64 + i % 2 * 4);
            }
        } else {
            const uint16_t* const from = static_cast<const uint16_t*>(a.q) + at;
#pragma unroll
            for (int h = 0; h < D / 64; ++h) {
                raw.v[h] = load_16<uint16_t>(from + h * 64);
            }
        }
    }
    template <class T>
    __device__ __forceinline__ uint4 load_16(const T* from) const {
        if (a.q_vectors != 0) {
            return *reinterpret_cast<const uint4*>(from);
        }
        uint4 v{};
#pragma unroll 1
        for (int i = 0; i < static_cast<int>(16 / sizeof(T)); ++i) { // rarely: element by element, a byte string's way
            uint32_t bits;
            if constexpr (sizeof(T) == 4) {
                bits = __float_as_uint(from[i]);
            } else {
                bits = from[i];
            }
            const int word = i * static_cast<int>(sizeof(T)) / 4;
            const uint32_t placed = bits << (i * static_cast<int>(sizeof(T)) % 4 * 8);
            v.x |= word == 0 ? placed : 0;
            v.y |= word == 1 ? placed : 0;
            v.z |= word == 2 ? placed : 0;
            v.w |= word == 3 ? placed : 0;
        }
        return v;
    }
    __device__ __forceinline__ void widen(float (&y)[kOwn], const Raw& raw) const {
#pragma unroll
        for (int h = 0; h < D / 64; ++h) {
            const uint32_t halves[4] = {raw.v[h].x, raw.v[h].y, raw.v[h].z, raw.v[h].w};
            const uint4 low = raw.v[2 * h];
            const uint4 high = raw.v[2 * h + 1];
            const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float2 two = {__uint_as_float(words[2 * i]), __uint_as_float(words[2 * i + 1])};
                if (a.type == 1) {
                    two = __half22float2(reinterpret_cast<const __half2&>(halves[i]));
                } else if (a.type == 2) {
                    two = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(halves[i]));
                }
                y[8 * h + 2 * i] = two.x;
                y[8 * h + 2 * i + 1] = two.y;
            }
        }
    }

    // Rotates a warp's 16 queries into shared memory, as fp16 of about 1.
    __device__ __forceinline__ void prepare_rows(int warp, int lane) const {
        const int u = lane % 8;
        const uint32_t signs = own_signs(u);
        Raw raw;
        load_query(raw, warp * 16 + lane / 8, u);
#pragma unroll 1
        for (int first = 0; first < 16; first += 4) {
            const int row = warp * 16 + first + lane / 8;
            float y[kOwn];
            widen(y, raw);
            if (first < 12) {
                load_query(raw, row + 4, u); // comes while this row is rotated
            }
            float bias = 0;
            if (a.mu != nullptr) {
#pragma unroll
                for (int i = 0; i < kOwn; ++i) {
                    bias = fmaf(y[i], a.mu[head * D + i / 8 * 64 + 8 * u + i % 8], bias);
                }
            }
            if (a.lambda != nullptr) {
#pragma unroll
                for (int i = 0; i < kOwn; ++i) {
                    y[i] /= a.lambda[head * D + i / 8 * 64 + 8 * u + i % 8];
                }
            }
            flip(y, signs);
            hadamard(y, u);
            float top = 0;
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
                top = fmaxf(top, fabsf(y[i]));
            }
#pragma unroll
            for (int h = 1; h < 8; h *= 2) {
                top = fmaxf(top, __shfl_xor_sync(0xffffffffU, top, h));
                bias += __shfl_xor_sync(0xffffffffU, bias, h);
            }
            // A power of two near the largest: fp16 then neither overflows nor loses the row to its smallest numbers.
            const uint32_t exponent = max(27U, min(227U, __float_as_uint(top) >> 23));
            const float down = __uint_as_float((254U - exponent) << 23);
            const int own = row % 64; // of the warpgroup's
            uint8_t* const to = queries + row / 64 * (64 * D * 2) + own * 128 + ((u ^ (own & 7)) << 4);
#pragma unroll
            for (int h = 0; h < D / 64; ++h) {
                const float* const x = y + 8 * h;
                *reinterpret_cast<uint4*>(to + h * (64 * 128)) = {
                    half_pair(x[0] * down, x[1] * down), half_pair(x[2] * down, x[3] * down),
                    half_pair(x[4] * down, x[5] * down), half_pair(x[6] * down, x[7] * down)};
            }
            if (u == 0) {
                units[row] = {__uint_as_float(exponent << 23) * (kImageUnit * kNorm) * a.scale_log2,
                              bias * a.scale_log2};
            }
        }
    }

    __device__ __forceinline__ RowState begin_row(int row) const {
        RowState state;
        state.scale = units[row].x;
        state.bias = units[row].y;
        state.largest = -INFINITY;
        state.sum = 0;
        state.end = end_of(min(query_of(first_row + row), a.q_len - 1));
        state.code_from = max(e.lowest(a, state.end), a.sinks);
        state.code_end = e.code_end(a, state.end);
        const int rows = a.group * a.q_len;
        state.offsets =
            a.offsets == nullptr
                ? nullptr
                : a.offsets + (static_cast<int64_t>(item) * rows + min(first_row + row, rows - 1)) * a.mu_blocks;
        return state;
    }

    __device__ __forceinline__ float cap(float x) const { // softcap * tanh(x), in units of log2
        return a.softcap_log2 * (1.0F - __fdividef(2.0F, 1.0F + exp2_fast(x * 2.8853900817779268F)));
    }

    // Hides from rows what they do not see. Columns of a code tile are tokens, of an exact one exact rows.
    __device__ __forceinline__ void mask(float (&s)[N / 2], const RowState (&rows)[2], int at, int t) const {
        if (at >= 0) {
            int begin[2];
            int end[2];
            bool whole = true;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                begin[r] = rows[r].code_from - at * N;
                end[r] = rows[r].code_end - at * N;
                whole = whole && begin[r] <= 0 && end[r] >= N;
            }
            if (__all_sync(0xffffffffU, whole)) {
                return;
            }
#pragma unroll
            for (int i = 0; i < N / 2; ++i) {
                const int column = i / 4 * 8 + i % 2 + 2 * t;
                if (column < begin[i % 4 / 2] || column >= end[i % 4 / 2]) {
                    s[i] = -INFINITY;
                }
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            const int row = ~at * N + i / 4 * 8 + i % 2 + 2 * t;
            const int p = e.position(row);
            const int end = rows[i % 4 / 2].end;
            const bool seen =
                row < e.n_exact && p < end && p >= e.lowest(a, end) && (p < a.sinks || p >= e.exact_from(a, end));
            s[i] = seen ? s[i] : -INFINITY;
        }
    }

    // Scores to probabilities; gives what the sums so far are to be multiplied with. offset: of the tile's scores, per row;
    // tiles of exact rows have one a column.
    __device__ __forceinline__ void softmax(float (&s)[N / 2], RowState (&rows)[2], uint32_t (&p)[N / 16][4],
                                            float (&keep)[2], int at, const float (&offset)[2], int t) const {
        const bool capped = a.softcap_log2 > 0;
        const bool mixed = a.offsets != nullptr && at < 0;
        if (mixed) {
#pragma unroll
            for (int i = 0; i < N / 2; ++i) {
                const int row = ~at * N + i / 4 * 8 + i % 2 + 2 * t;
                const RowState& state = rows[i % 4 / 2];
                if (s[i] != -INFINITY) {
                    s[i] = fmaf(s[i], state.scale, state.offsets[mean_block(e.position(row), a.mu_blocks)]);
                }
            }
        }
        if (capped) {
#pragma unroll
            for (int i = 0; i < N / 2; ++i) {
                const int r = i % 4 / 2;
                if (s[i] != -INFINITY) {
                    s[i] = cap(mixed ? s[i] : fmaf(s[i], rows[r].scale, rows[r].bias + offset[r]));
                }
            }
        }
        float scale[2];
        float base[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float top = s[2 * r];
#pragma unroll
            for (int j = 0; j < N / 8; ++j) {
                top = fmaxf(top, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
            }
            scale[r] = capped || mixed ? 1.0F : rows[r].scale;
            const float add = capped || mixed ? 0.0F : offset[r];
            const float now = fmaxf(rows[r].largest, fmaf(quad_max(top), scale[r], add));
            base[r] = now == -INFINITY ? 0 : now;
            keep[r] = exp2_fast(rows[r].largest - base[r]);
            rows[r].largest = now;
            rows[r].sum *= keep[r];
            base[r] -= add;
        }
#pragma unroll
        for (int j = 0; j < N / 16; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) { // registers of the A operand: rows g, g + 8, then 8 columns on
                const int r = i % 2;
                const int from = 8 * j + i / 2 * 4 + 2 * r;
                const float p0 = exp2_fast(fmaf(s[from], scale[r], -base[r]));
                const float p1 = exp2_fast(fmaf(s[from + 1], scale[r], -base[r]));
                rows[r].sum += p0 + p1;
                p[j][i] = half_pair(p0, p1);
            }
        }
    }

    // What the values' sums of a row are to be multiplied with.
    __device__ __forceinline__ float row_factor(const RowState& state, int row) const {
        float total = quad_sum(state.sum);
        if ((a.splits > 1 || a.sink_logits != nullptr) && total > 0) {
            // A soft-capped score has its bias in it; without the cap the largest is without.
            const float top = state.largest + (a.softcap_log2 > 0 ? 0.0F : state.bias);
            if (a.splits > 1) {
                units[row].x = top + __log2f(total); // for store_row; all lanes of the row write the same
                return e.too_long ? NAN : kImageUnit * kNorm / total;
            }
            const int r = first_row + row;
            const float logit = a.sink_logits[head * a.group + r - query_of(r) * a.group];
            total += exp2f(logit * 1.4426950408889634F - top);
        } else if (a.splits > 1) {
            units[row].x = -INFINITY;
        }
        return e.too_long ? NAN : total > 0 ? kImageUnit * kNorm / total : 0;
    }

    __device__ __forceinline__ void store_row(const float (&y)[kOwn], int row, int u) const {
        const int r = first_row + row;
        const int query = query_of(r);
        if (query >= a.q_len) {
            return;
        }
        if (a.splits > 1) {
            const int64_t at = (static_cast<int64_t>(item) * a.splits + split) * (a.group * a.q_len) + r;
            if (u == 0) {
                a.partial_log2[at] = units[row].x;
            }
#pragma unroll
            for (int h = 0; h < D / 64; ++h) {
                const float* const x = y + 8 * h;
                auto* const to = reinterpret_cast<float4*>(a.partial + at * D + 64 * h + 8 * u);
                to[0] = {x[0], x[1], x[2], x[3]};
                to[1] = {x[4], x[5], x[6], x[7]};
            }
            return;
        }
        const int64_t at =
            b * a.out_batch + query * a.out_query + (head * a.group + r - query * a.group) * a.out_head + 8 * u;
#pragma unroll
        for (int h = 0; h < D / 64; ++h) {
            const float* const x = y + 8 * h;
            const int64_t to = at + 64 * h;
            if (a.out_vectors == 0) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    store_element(a.out, to + i, a.type, x[i]);
                }
            } else if (a.type == 0) {
                auto* const p = reinterpret_cast<float4*>(static_cast<float*>(a.out) + to);
                p[0] = {x[0], x[1], x[2], x[3]};
                p[1] = {x[4], x[5], x[6], x[7]};
            } else {
                uint32_t pairs[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const __nv_bfloat162 bf = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
                    pairs[i] = a.type == 1 ? half_pair(x[2 * i], x[2 * i + 1]) : reinterpret_cast<const uint32_t&>(bf);
                }
                *reinterpret_cast<uint4*>(static_cast<uint16_t*>(a.out) + to) = {pairs[0], pairs[1], pairs[2],
                                                                                 pairs[3]};
            }
        }
    }

    // From sums to output rows, eight at a time, through the part of the queries' memory that is this warp's: nobody
    // reads queries any more. 8-channel block j of row g lies at block j ^ g, against bank conflicts.
    __device__ __forceinline__ void write_rows(float (&o)[D / 2], const RowState (&rows)[2], int warp, int lane) const {
        const int g = lane / 4;
        const int t = lane % 4;
        const int u = lane % 8;
        const uint32_t signs = own_signs(u);
        auto* const staging = reinterpret_cast<float*>(queries + warp / 4 * (64 * D * 2) + warp % 4 * (16 * D * 2));
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float factor = row_factor(rows[r], warp * 16 + 8 * r + g);
            __syncwarp();
#pragma unroll
            for (int j = 0; j < D / 8; ++j) {
                *reinterpret_cast<float2*>(staging + g * D + (j ^ g) * 8 + 2 * t) = {o[4 * j + 2 * r] * factor,
                                                                                     o[4 * j + 2 * r + 1] * factor};
            }
            __syncwarp();
#pragma unroll 1
            for (int row = lane / 8; row < 8; row += 4) {
                float y[kOwn];
#pragma unroll
                for (int h = 0; h < D / 64; ++h) {
                    const auto* const from =
                        reinterpret_cast<const float4*>(staging + row * D + ((8 * h + u) ^ row) * 8);
                    const float4 low = from[0];
                    const float4 high = from[1];
                    float* const x = y + 8 * h;
                    x[0] = low.x;
                    x[1] = low.y;
                    x[2] = low.z;
                    x[3] = low.w;
                    x[4] = high.x;
                    x[5] = high.y;
                    x[6] = high.z;
                    x[7] = high.w;
                }
                hadamard(y, u);
                flip(y, signs);
                store_row(y, warp * 16 + 8 * r + row, u);
            }
        }
    }

    __device__ __forceinline__ static void warpgroup_barrier(int warp) {
        asm volatile("bar.sync %0, 128;" ::"r"(1 + warp / 4) : "memory");
    }

    __device__ __forceinline__ void attend(int warp, int lane) const {
        const int g = lane / 4;
        const int t = lane % 4;
        prepare_rows(warp, lane);
        barrier_fence(); // the tensor cores read the queries past the ordinary path
        warpgroup_barrier(warp);
        RowState rows[2] = {begin_row(warp * 16 + g), begin_row(warp * 16 + 8 + g)};
        const uint32_t q = shared_address(queries) + warp / 4 * (64 * D * 2);
        float o[D / 2];
#pragma unroll
        for (int i = 0; i < D / 2; ++i) {
            o[i] = 0;
        }
        float s[N / 2];
        int stage = 0;
        int before = 0;
        uint32_t parity = 0;
        for (int j = 0; j < n; ++j) {
            const int at = tile(first_tile + j);
            float offset[2] = {0, 0};
            if (a.offsets != nullptr && at >= 0) {
                offset[0] = rows[0].offsets[mean_block(at * N, a.mu_blocks)];
                offset[1] = rows[1].offsets[mean_block(at * N, a.mu_blocks)];
            }
            barrier_wait(full + stage, parity);
            const uint32_t k = shared_address(ring) + stage * kStageBytes;
            P::template scores<D, N>(s, q, k, warp, lane);
            P::wait(s, o); // and for the values of the tile before
            if (WARPGROUPS && j > 0 && lane == 0) {
                barrier_arrive(empty + before);
            }
            mask(s, rows, at, t);
            uint32_t p[N / 16][4];
            float keep[2];
            softmax(s, rows, p, keep, at, offset, t);
            if (__any_sync(0xffffffffU, keep[0] != 1.0F || keep[1] != 1.0F)) {
#pragma unroll
                for (int i = 0; i < D / 2; ++i) {
                    o[i] *= keep[i % 4 / 2];
                }
            }
            P::template values<D, N>(o, p, k + kStageBytes / 2, lane);
            if (!WARPGROUPS) {
                __syncwarp();
                if (lane == 0) {
                    barrier_arrive(empty + stage);
                }
            }
            before = stage;
            if (++stage == STAGES) {
                stage = 0;
                parity ^= 1U;
            }
        }
        P::wait(s, o);
        warpgroup_barrier(warp); // all have read the queries
        write_rows(o, rows, warp, lane);
    }
};

// Of 168 registers a thread that three warpgroups start with.
__device__ __forceinline__ void give_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
#endif
}
__device__ __forceinline__ void take_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
#endif
}

template <int D, int N, int STAGES, bool WARPGROUPS>
__global__ void __launch_bounds__(flash_threads(WARPGROUPS), 1) flash_kernel(const __grid_constant__ PrefillArgs args) {
#if !defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if constexpr (WARPGROUPS) {
        __trap(); // never chosen: launch_prefill looks what the kernel was compiled for
    } else
#endif
    {
        extern __shared__ __align__(16) uint8_t shared[];
        // The last queries see most and begin first.
        const int item = static_cast<int>(blockIdx.x) % args.items;
        const int part = static_cast<int>(blockIdx.x) / args.items;
        const int query_block = args.query_blocks - 1 - part / args.splits;
        Flash<D, N, STAGES, WARPGROUPS> flash(args, shared, item, query_block, part % args.splits);
        const int warp = static_cast<int>(threadIdx.x) / 32;
        const int lane = static_cast<int>(threadIdx.x) % 32;
        if (threadIdx.x == 0) {
            for (int i = 0; i < STAGES; ++i) {
                barrier_init(flash.full + i);
                barrier_init(flash.empty + i, kFlashWarps);
            }
            barrier_fence();
        }
        __syncthreads();
        if (warp >= kFlashWarps) {
            if constexpr (WARPGROUPS) {
                give_registers();
            }
            if (warp == kFlashWarps) {
                flash.copy_tiles(lane);
            }
        } else {
            if constexpr (WARPGROUPS) {
                take_registers();
            }
            flash.attend(warp, lane);
        }
    }
}

template <int D, int N, int STAGES, bool WARPGROUPS>
FlashKernel flash_choice() {
    return {flash_kernel<D, N, STAGES, WARPGROUPS>, flash_threads(WARPGROUPS),
            Flash<D, N, STAGES, false>::kSharedBytes};
}

} // namespace turboquant::cuda
