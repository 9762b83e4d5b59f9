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

// y = H y / sqrt(D) for a row spread over four lanes: y[2 j + v] is channel 8 j + 2 t + v of lane t.
template <int D>
__device__ __forceinline__ void hadamard_quad(float (&y)[D / 4], int t) {
#pragma unroll
    for (int h = 1; h < D / 4; h *= 2) {
#pragma unroll
        for (int i = 0; i < D / 4; ++i) {
            if ((i & h) == 0) {
                const float p = y[i];
                const float q = y[i + h];
                y[i] = p + q;
                y[i + h] = p - q;
            }
        }
    }
#pragma unroll
    for (int h = 1; h < 4; h *= 2) {
        const float sign = (t & h) != 0 ? -1.0F : 1.0F;
#pragma unroll
        for (int i = 0; i < D / 4; ++i) {
            y[i] = fmaf(y[i], sign, __shfl_xor_sync(0xffffffffU, y[i], h));
        }
    }
    const float norm = D == 64 ? 0.125F : D == 128 ? 0.08838834764831845F : 0.0625F;
#pragma unroll
    for (int i = 0; i < D / 4; ++i) {
        y[i] *= norm;
    }
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
    static constexpr int kSharedBytes = kAlignment + kQueryBytes + STAGES * kStageBytes + 2 * STAGES * 8;

    using P = Products<WARPGROUPS>;

    const PrefillArgs& a;
    const Extent e;
    const int b, head;
    int first_row, last_query, first_query; // of this block
    int code_begin, code_tiles, sink_tiles, window_tile, n; // tiles of N tokens
    uint8_t* queries;
    uint8_t* ring;
    uint64_t* full;
    uint64_t* empty;

    __device__ __forceinline__ int end_of(int query) const {
        return a.causal != 0 ? e.length - a.q_len + 1 + query : e.length;
    }

    __device__ __forceinline__ Flash(const PrefillArgs& args, uint8_t* shared, int item, int query_block)
        : a(args), e(args, (args.first_item + item) / args.kv_heads), b((args.first_item + item) / args.kv_heads),
          head((args.first_item + item) % args.kv_heads) {
        const uint32_t at = shared_address(shared);
        queries = shared + ((at + kAlignment - 1) / kAlignment * kAlignment - at);
        ring = queries + kQueryBytes;
        full = reinterpret_cast<uint64_t*>(ring + STAGES * kStageBytes);
        empty = full + STAGES;
        first_row = query_block * kPrefillRows;
        first_query = first_row / a.group;
        last_query = min((first_row + kPrefillRows - 1) / a.group, a.q_len - 1);
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
        n = code_tiles + sink_tiles + max(window_end - window_tile, 0);
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
    __device__ __forceinline__ void copy_tiles(int item, int lane) const {
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
            const int at = tile(j);
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
    };

    template <class T2, class Load>
    __device__ __forceinline__ static void load_pairs(float (&y)[D / 4], const void* p, int64_t at, Load&& widen) {
        const auto* const from = reinterpret_cast<const T2*>(static_cast<const uint8_t*>(p)) + at / 2;
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
            const float2 two = widen(from[j * 4]);
            y[2 * j] = two.x;
            y[2 * j + 1] = two.y;
        }
    }

    __device__ __forceinline__ void load_query(float (&y)[D / 4], int64_t at, int t) const {
        if (a.q_pairs == 0) {
#pragma unroll
            for (int i = 0; i < D / 4; ++i) {
                y[i] = load_element(a.q, at + i / 2 * 8 + i % 2 + 2 * t, a.type);
            }
        } else if (a.type == 0) {
            load_pairs<float2>(y, a.q, at + 2 * t, [](float2 x) { return x; });
        } else if (a.type == 1) {
            load_pairs<__half2>(y, a.q, at + 2 * t, [](__half2 x) { return __half22float2(x); });
        } else {
            load_pairs<__nv_bfloat162>(y, a.q, at + 2 * t, [](__nv_bfloat162 x) { return __bfloat1622float2(x); });
        }
    }

    __device__ __forceinline__ float sign(int channel) const {
        return (a.signs[channel / 32] >> (channel % 32) & 1U) != 0 ? -1.0F : 1.0F;
    }

    // Rotates a row into shared memory, as fp16 of about 1.
    __device__ __forceinline__ void prepare_row(RowState& state, int warp, int row, int t) const {
        const int r = first_row + warp * 16 + row;
        const int query = min(r / a.group, a.q_len - 1);
        const bool real = r < a.group * a.q_len;
        float y[D / 4];
#pragma unroll
        for (int i = 0; i < D / 4; ++i) {
            y[i] = 0;
        }
        if (real) {
            load_query(y, b * a.q_batch + query * a.q_query + (head * a.group + r % a.group) * a.q_head, t);
        }
        float bias = 0;
#pragma unroll
        for (int i = 0; i < D / 4; ++i) {
            const int channel = i / 2 * 8 + i % 2 + 2 * t;
            if (a.mu != nullptr) {
                bias = fmaf(y[i], a.mu[head * D + channel], bias);
            }
            if (a.lambda != nullptr) {
                y[i] /= a.lambda[head * D + channel];
            }
            y[i] *= sign(channel);
        }
        hadamard_quad<D>(y, t);
        float top = 0;
#pragma unroll
        for (int i = 0; i < D / 4; ++i) {
            top = fmaxf(top, fabsf(y[i]));
        }
        top = quad_max(top);
        // A power of two near the largest: fp16 then neither overflows nor loses the row to its smallest numbers.
        const uint32_t exponent = max(27U, min(227U, __float_as_uint(top) >> 23));
        const float down = __uint_as_float((254U - exponent) << 23);
        uint8_t* const to = queries + warp / 4 * (64 * D * 2);
        const int own = warp % 4 * 16 + row;
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
            *reinterpret_cast<uint32_t*>(to + j / 8 * (64 * 128) + own * 128 + (((j % 8) ^ (own & 7)) << 4) + t * 4) =
                half_pair(y[2 * j] * down, y[2 * j + 1] * down);
        }
        state.scale = __uint_as_float(exponent << 23) * kImageUnit * a.scale_log2;
        state.bias = quad_sum(bias) * a.scale_log2;
        state.largest = -INFINITY;
        state.sum = 0;
        state.end = end_of(query);
        state.code_from = max(e.lowest(a, state.end), a.sinks);
        state.code_end = e.code_end(a, state.end);
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
            const bool seen = row < e.n_exact && p < end && p >= e.lowest(a, end) &&
                              (p < a.sinks || p >= e.exact_from(a, end));
            s[i] = seen ? s[i] : -INFINITY;
        }
    }

    // Scores to probabilities; gives what the sums so far are to be multiplied with.
    __device__ __forceinline__ void softmax(float (&s)[N / 2], RowState (&rows)[2], uint32_t (&p)[N / 16][4],
                                            float (&keep)[2]) const {
        const bool capped = a.softcap_log2 > 0;
        if (capped) {
#pragma unroll
            for (int i = 0; i < N / 2; ++i) {
                s[i] = s[i] == -INFINITY ? s[i] : cap(fmaf(s[i], rows[i % 4 / 2].scale, rows[i % 4 / 2].bias));
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
            scale[r] = capped ? 1.0F : rows[r].scale;
            const float now = fmaxf(rows[r].largest, quad_max(top) * scale[r]);
            base[r] = now == -INFINITY ? 0 : now;
            keep[r] = exp2_fast(rows[r].largest - base[r]);
            rows[r].largest = now;
            rows[r].sum *= keep[r];
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

    __device__ __forceinline__ void write_row(float (&o)[D / 2], int r, const RowState& state, int warp, int row,
                                              int t) const {
        const int at_row = first_row + warp * 16 + row;
        const int query = at_row / a.group;
        const int q_head = head * a.group + at_row % a.group;
        const bool real = at_row < a.group * a.q_len;
        float total = quad_sum(state.sum);
        if (a.sink_logits != nullptr && total > 0 && real) {
            // A soft-capped score has its bias in it; without the cap the largest is without.
            const float top = state.largest + (a.softcap_log2 > 0 ? 0.0F : state.bias);
            total += exp2f(a.sink_logits[q_head] * 1.4426950408889634F - top);
        }
        const float factor = e.too_long ? NAN : total > 0 ? kImageUnit / total : 0;
        float y[D / 4];
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
            y[2 * j] = o[4 * j + 2 * r] * factor;
            y[2 * j + 1] = o[4 * j + 2 * r + 1] * factor;
        }
        hadamard_quad<D>(y, t);
        if (!real) {
            return;
        }
        const int64_t at = b * a.out_batch + query * a.out_query + q_head * a.out_head + 2 * t;
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
            const float y0 = y[2 * j] * sign(8 * j + 2 * t);
            const float y1 = y[2 * j + 1] * sign(8 * j + 2 * t + 1);
            const int64_t to = at + 8 * j;
            if (a.out_pairs == 0) {
                store_element(a.out, to, a.type, y0);
                store_element(a.out, to + 1, a.type, y1);
            } else if (a.type == 0) {
                *reinterpret_cast<float2*>(static_cast<float*>(a.out) + to) = float2{y0, y1};
            } else if (a.type == 1) {
                *reinterpret_cast<__half2*>(static_cast<__half*>(a.out) + to) = __floats2half2_rn(y0, y1);
            } else {
                *reinterpret_cast<__nv_bfloat162*>(static_cast<__nv_bfloat16*>(a.out) + to) =
                    __floats2bfloat162_rn(y0, y1);
            }
        }
    }

    __device__ __forceinline__ void attend(int warp, int lane) const {
        const int g = lane / 4;
        const int t = lane % 4;
        RowState rows[2];
        prepare_row(rows[0], warp, g, t);
        prepare_row(rows[1], warp, g + 8, t);
        barrier_fence(); // the tensor cores read the queries past the ordinary path
        asm volatile("bar.sync %0, 128;" ::"r"(1 + warp / 4) : "memory"); // the warpgroup
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
            barrier_wait(full + stage, parity);
            const uint32_t k = shared_address(ring) + stage * kStageBytes;
            P::template scores<D, N>(s, q, k, warp, lane);
            P::wait(s, o); // and for the values of the tile before
            if (WARPGROUPS && j > 0 && lane == 0) {
                barrier_arrive(empty + before);
            }
            mask(s, rows, tile(j), t);
            uint32_t p[N / 16][4];
            float keep[2];
            softmax(s, rows, p, keep);
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
        write_row(o, 0, rows[0], warp, g, t);
        write_row(o, 1, rows[1], warp, g + 8, t);
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
        const int query_block = args.query_blocks - 1 - static_cast<int>(blockIdx.x) / args.items;
        Flash<D, N, STAGES, WARPGROUPS> flash(args, shared, item, query_block);
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
                flash.copy_tiles(item, lane);
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
    return {flash_kernel<D, N, STAGES, WARPGROUPS>, flash_threads(WARPGROUPS), Flash<D, N, STAGES, false>::kSharedBytes};
}

} // namespace turboquant::cuda
