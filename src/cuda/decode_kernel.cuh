// Attention over compressed pages for few queries. One block takes a contiguous range of all chunks of 64 tokens of all
// (sequence, KV head, block of query rows): the items. Its warps take the range's chunks in turn, each with a ring of
// chunks in flight and a softmax of its own; at an item's end they merge, and the last block to finish an item merges
// the blocks. docs/cuda.md explains the arithmetic. Internal.
//
// Orientation: tokens (then channels) are rows of the tensor core's result, query rows its columns. A query row has two
// columns, the high and the low byte of 16-bit integers, so that int8 products carry 16 bits of the query and of the
// probabilities; both land in one lane. Lane 4 g + t: token g (and g + 8) of a tile, query row t of four.
#pragma once

#include "cuda/decode.h"
#include "cuda/device.cuh"
#include "cuda/gpu_layout.h"
#include "cuda/unpack.cuh"

#include <cfloat>

namespace turboquant::cuda {

inline constexpr unsigned kAll = 0xffffffffU;
// Integer accumulators start here: read as a float they then are kMagic + sum, for |sum| <= 2^22.
inline constexpr int32_t kMagicBits = 0x4b400000;
inline constexpr float kMagic = 12582912.0F;
inline constexpr float kWeightMagic = 8388608.0F; // + an integer below 2^16: that integer in the lowest bits
inline constexpr float kMostWeight = 65535.0F;
inline constexpr int kMostQuery = 127 * 256 + 127; // of 16 bits whose two halves are signed bytes
// A chunk whose probabilities are all below 2^-20 of the largest so far adds nothing to a 16-bit-exact sum of values.
inline constexpr float kSkipLog2 = 20.0F;

template <int D, int ROWS>
struct Fixed { // bytes of shared memory before the rings
    static constexpr int kQueryFragments = ROWS / 4 * (D / 32) * 32 * 8;
    static constexpr int kQueryFloats = ROWS * D * 4;
    static constexpr int kRowParams = ROWS * 8 * 4;
    __host__ __device__ static constexpr int merge_tiles(int warps) { // m16 tiles of output that one merge round takes
        int tiles = D / 16;
        while (tiles > 1 && warps * ROWS * tiles * 16 * 4 > 16384) {
            tiles /= 2;
        }
        return tiles;
    }
    // Floats of one warp's row in the merge buffer: rows 8 banks apart.
    __host__ __device__ static constexpr int merge_stride(int warps) { return merge_tiles(warps) * 16 + 8; }
    // The buffer also holds the probabilities of exact rows, [warp][row][32], while there is nothing to merge.
    __host__ __device__ static constexpr int merge_bytes(int warps) {
        const int merge = warps * ROWS * merge_stride(warps) * 4;
        const int exact = warps * ROWS * kExactChunkRows * 4;
        return merge > exact ? merge : exact;
    }
    __host__ __device__ static constexpr int bytes(int warps) {
        // fragments, rotated queries, the block's merged output, parameters, warps' (max, sum), merged (max, sum),
        // barriers, the flag, the merge buffer
        return kQueryFragments + 2 * kQueryFloats + kRowParams + warps * ROWS * 8 + ROWS * 8 +
               warps * kMostStages * 8 + 16 + merge_bytes(warps);
    }
};


// Where a chunk lies: item (sequence, KV head, block of query rows) and chunk within it.
struct Cursor {
    int b;
    int hq; // KV head * query_blocks + block
    int index;
    int n;     // chunks of the item, codes and exact rows
    int codes; // of them, chunks of codes
    int first; // first chunk of codes that a query sees
    int length;
};

template <int CHUNK>
__device__ __forceinline__ void item_extent(const AttendArgs& a, Cursor& c) {
    c.length = c.b < a.batch ? a.lengths[c.b] : 0;
    const int first_end = a.causal != 0 ? c.length - a.q_len + 1 : c.length; // tokens that the first query sees
    const int code_end = a.window > 0 ? c.length - a.window : c.length;      // for the last query; before: less
    const int code_begin = a.sliding_window > 0 ? max(first_end - a.sliding_window, 0) : 0;
    c.first = max(min(code_begin, code_end), 0) / CHUNK;
    c.codes = code_end > 0 ? max((code_end + CHUNK - 1) / CHUNK - c.first, 0) : 0;
    int exact = 0;
    if (a.ring > 0 || a.sinks > 0) {
        const int window_begin = a.window > 0 ? max(first_end - a.window, 0) : c.length;
        exact = min(a.sinks, c.length) + max(c.length - max(window_begin, a.sinks), 0);
    }
    c.n = max(c.codes + (exact + kExactChunkRows - 1) / kExactChunkRows, 1);
}

template <int D, int KB, int VB, int ROWS, int WARPS, int TILES>
struct Attend {
    static constexpr int kTiles = TILES; // of a chunk
    static constexpr int kChunkTokens = TILES * kTileTokens;
    static constexpr int kNT = ROWS / 4;
    static constexpr int kSteps = D / 32;
    static constexpr int kOutTiles = D / 16;
    using F = Fixed<D, ROWS>;

    // ---- shared memory ----
    uint2* fragments;    // [nt][step][lane]
    float* rotated;      // [row][D]
    float* merged;       // [row][D]
    float* params;       // [row][8]: A, B, C, constant, lowest, highest token
    float* warp_state;   // [warp][row][2]
    float* block_state;  // [row][2]
    float* exact_p;      // [row][32], this warp's
    uint64_t* barriers;  // [stage], this warp's
    int* flag;
    float* merge;        // [warp][row][merge_stride]
    uint8_t* ring;       // [stage][chunk], this warp's

    const AttendArgs& a;
    const int warp, lane, g, t;
    uint32_t signs; // of the rotation, bit e < D/32: channel lane * D/32 + e

    // ---- state of this warp for the item at hand ----
    float largest[kNT], sum[kNT], correction[kNT];
    float out[kNT][kOutTiles][2];
    uint2 query[kNT][kSteps];
    float scale_high[kNT], scale_low[kNT], scale_constant[kNT], constant[kNT];
    int lowest[kNT], highest[kNT];
    bool padding[kNT];
    int safe_begin, safe_end; // tokens that all of the item's queries see as codes

    __device__ __forceinline__ Attend(const AttendArgs& args, uint8_t* shared)
        : a(args), warp(threadIdx.x / 32), lane(threadIdx.x % 32), g(threadIdx.x % 32 / 4), t(threadIdx.x % 4) {
        signs = a.signs[lane * (D / 32) / 32] >> (lane * (D / 32) % 32);
        uint8_t* at = shared;
        const auto take = [&at](int bytes) {
            uint8_t* const p = at;
            at += bytes;
            return p;
        };
        // The rings first: bulk copies want 16-byte alignment, and everything else is a multiple of 4.
        ring = take(WARPS * a.stages * chunk_bytes()) + warp * a.stages * chunk_bytes();
        merge = reinterpret_cast<float*>(take(F::merge_bytes(WARPS)));
        fragments = reinterpret_cast<uint2*>(take(F::kQueryFragments));
        barriers = reinterpret_cast<uint64_t*>(take(WARPS * kMostStages * 8)) + warp * kMostStages;
        rotated = reinterpret_cast<float*>(take(F::kQueryFloats));
        merged = reinterpret_cast<float*>(take(F::kQueryFloats));
        params = reinterpret_cast<float*>(take(F::kRowParams));
        exact_p = merge + warp * ROWS * kExactChunkRows;
        warp_state = reinterpret_cast<float*>(take(WARPS * ROWS * 8));
        block_state = reinterpret_cast<float*>(take(ROWS * 8));
        flag = reinterpret_cast<int*>(take(16));
    }

    // Known to the compiler where the bits are.
    __device__ __forceinline__ int tile_bytes() const {
        return KB != 0 ? cuda::tile_bytes(D, KB == 0 ? 4 : KB, VB == 0 ? 4 : VB) : a.tile_bytes;
    }
    __device__ __forceinline__ int chunk_bytes() const { return kTiles * tile_bytes(); }

    __device__ __forceinline__ float rotation_sign(int e) const { return (signs >> e & 1U) != 0 ? -1.0F : 1.0F; }

    // Query row r of an item: query r / group, head of its group r % group.
    __device__ __forceinline__ int item_row(const Cursor& c, int row) const {
        return a.query_blocks == 1 ? row : c.hq % a.query_blocks * ROWS + row;
    }
    __device__ __forceinline__ int kv_head(const Cursor& c) const {
        return a.query_blocks == 1 ? c.hq : c.hq / a.query_blocks;
    }

    // This warp's query rows of an item, as they are: loaded early, so that the look-up overlaps other work.
    static constexpr int kOwn = D / 32;                          // channels of a row in a lane
    static constexpr int kOwnRows = (ROWS + WARPS - 1) / WARPS; // rows of a warp
    struct RawQueries {
        float x[kOwnRows][kOwn];
    };

    __device__ __forceinline__ bool real_row(const Cursor& c, int row) const {
        return row < ROWS && item_row(c, row) < a.group * a.q_len && c.b < a.batch;
    }

    __device__ __forceinline__ void load_queries(const Cursor& c, RawQueries& raw) const {
#pragma unroll
        for (int k = 0; k < kOwnRows; ++k) {
            const int row = warp + k * WARPS;
            const int r = item_row(c, row);
            const bool real = real_row(c, row);
            const int64_t at = c.b * a.q_batch + r / a.group * a.q_query + (kv_head(c) * a.group + r % a.group) * a.q_head;
#pragma unroll
            for (int e = 0; e < kOwn; ++e) {
                raw.x[k][e] = real ? load_element(a.q, at + lane * kOwn + e, a.type) : 0;
            }
        }
    }

    // Rotates the item's queries into shared memory, as floats and as fragments. The whole block; ends in a barrier.
    __device__ __forceinline__ void prepare_queries(const Cursor& c, const RawQueries& raw) {
#pragma unroll
        for (int k = 0; k < kOwnRows; ++k) {
            const int row = warp + k * WARPS;
            if (row >= ROWS) {
                break;
            }
            const bool real = real_row(c, row);
            float y[kOwn];
            float bias = 0;
#pragma unroll
            for (int e = 0; e < kOwn; ++e) {
                const int channel = lane * kOwn + e;
                float x = raw.x[k][e];
                if (a.mu != nullptr) {
                    bias += x * a.mu[kv_head(c) * D + channel];
                }
                if (a.lambda != nullptr) {
                    x /= a.lambda[kv_head(c) * D + channel];
                }
                y[e] = x * rotation_sign(e);
            }
            hadamard_warp<D>(y, lane);
            float top = 0;
#pragma unroll
            for (int e = 0; e < kOwn; ++e) {
                top = fmaxf(top, fabsf(y[e]));
            }
            top = __uint_as_float(__reduce_max_sync(kAll, __float_as_uint(top))); // not negative: ordered like its bits
            if (a.mu != nullptr) {
#pragma unroll
                for (int h = 16; h > 0; h /= 2) {
                    bias += __shfl_xor_sync(kAll, bias, h);
                }
            }
            const float step = top / kMostQuery;
            const float inverse = top > 0 ? kMostQuery / top : 0;
            int total = 0;
            auto* const bytes = reinterpret_cast<uint8_t*>(fragments);
#pragma unroll
            for (int e = 0; e < kOwn; ++e) {
                const int channel = lane * kOwn + e;
                const int value = max(-kMostQuery, min(kMostQuery, __float2int_rn(y[e] * inverse)));
                const int low = ((value + 128) & 255) - 128;
                const int high = (value - low) >> 8;
                total += value;
                const int quarter = channel / (D / 4);
                const int rest = channel % (D / 4);
                const int at = ((row / 4 * kSteps + rest / 8) * 32 + row % 4 * 8 + quarter) * 8 + rest / 4 % 2 * 4 +
                               channel % 4; // the high byte's column is 2 (row % 4), 4 lanes a column
                bytes[at] = static_cast<uint8_t>(high);
                bytes[at + 4 * 8] = static_cast<uint8_t>(low);
                rotated[row * D + channel] = y[e];
            }
            total = __reduce_add_sync(kAll, total);
            if (lane == 0) {
                float* const p = params + row * 8;
                const float unit = step * a.scale_log2;
                p[0] = unit;
                p[1] = unit * static_cast<float>(total);
                p[2] = bias * a.scale_log2;
                const int i = item_row(c, row) / a.group;
                const int end = a.causal != 0 ? c.length - a.q_len + 1 + i : c.length;
                // A row of padding sees everything, with a query of zeros.
                p[3] = __int_as_float(real && a.sliding_window > 0 ? max(end - a.sliding_window, 0) : 0);
                p[4] = __int_as_float(real ? end : 0x7fffffff);
                p[5] = __int_as_float(real ? 1 : 0);
            }
        }
        __syncthreads();
    }

    __device__ __forceinline__ void begin_item(const Cursor& item) {
        safe_end = (a.causal != 0 ? item.length - a.q_len + 1 : item.length) - a.window;
        safe_begin = a.sliding_window > 0 ? max(item.length - a.sliding_window, a.sinks) : a.sinks;
        const float step = KB == 0 ? (a.key_bits == 4 ? 2.0F : 1.0F) : Unpack<KB == 0 ? 4 : KB>::kStep;
        const float offset = KB == 0 ? (a.key_bits == 4 ? 1.0F : 0.0F) : Unpack<KB == 0 ? 4 : KB>::kOffset;
#pragma unroll
        for (int nt = 0; nt < kNT; ++nt) {
            const float* const p = params + (nt * 4 + t) * 8;
            scale_low[nt] = p[0] * step;
            scale_high[nt] = p[0] * step * 256;
            scale_constant[nt] = p[1] * offset;
            constant[nt] = p[2];
            lowest[nt] = __float_as_int(p[3]);
            highest[nt] = __float_as_int(p[4]);
            padding[nt] = __float_as_int(p[5]) == 0;
            largest[nt] = -INFINITY;
            sum[nt] = 0;
            correction[nt] = 0;
#pragma unroll
            for (int m = 0; m < kOutTiles; ++m) {
                out[nt][m][0] = 0;
                out[nt][m][1] = 0;
            }
#pragma unroll
            for (int s = 0; s < kSteps; ++s) {
                query[nt][s] = fragments[(nt * kSteps + s) * 32 + lane];
            }
        }
    }

    __device__ __forceinline__ float cap(float score) const { // softcap * tanh(score / softcap), in units of log2
        // tanh(x) = 1 - 2 / (1 + e^2x); scale_log2 already holds scale / softcap here
        const float e = exp2_fast(score * 2.8853900817779268F);
        return a.softcap_log2 * (1.0F - 2.0F / (1.0F + e));
    }

    // ---- the ring ----

    // The copies run ahead of the work: where they stand. Pages are looked up for as many of this warp's next chunks of
    // the item as a warp has lanes, at once: one after the other they would wait behind everyone's copies.
    struct Ahead {
        Cursor c;
        int next;  // chunk of all that c stands at
        int end;   // of the block's range
        int pages; // lane: of piece lane % pieces of chunk lane / pieces from the first of the batch on
        int used;  // chunks of the batch that lie behind
        int stage;
        const int32_t* table;     // c's row of the page table
        const uint8_t* head_base; // c's head in page 0
    };

    __device__ __forceinline__ void enter_item(Ahead& ahead) const {
        ahead.table = a.page_table + ahead.c.b * a.page_table_stride;
        ahead.head_base = a.pages + static_cast<int64_t>(kv_head(ahead.c)) * (a.page_size / kTileTokens) * tile_bytes();
    }

    // A chunk is one piece, or several pages' pieces: a page of 16 tokens is a fourth of a chunk of 64.
    __device__ __forceinline__ int piece_tokens() const { return min(a.page_size, kChunkTokens); }

    __device__ __forceinline__ void look_up(Ahead& ahead) const {
        const int pieces = kChunkTokens / piece_tokens();
        const int later = lane / pieces;
        const int index = ahead.c.index + later * WARPS;
        const int token = (ahead.c.first + index) * kChunkTokens + lane % pieces * piece_tokens();
        if (ahead.next + later * WARPS < ahead.end && index < ahead.c.codes && token < ahead.c.length) {
            ahead.pages = ahead.table[token >> a.page_shift];
        }
        ahead.used = 0;
    }

    __device__ __forceinline__ void advance(Ahead& ahead) const {
        ahead.next += WARPS;
        ahead.c.index += WARPS;
        ++ahead.used;
        if (ahead.c.index >= ahead.c.n) { // rarely: into a later item
            skip_items(ahead);
            look_up(ahead);
        } else if (ahead.used * (kChunkTokens / piece_tokens()) == 32) {
            look_up(ahead);
        }
    }

    __device__ __forceinline__ void skip_items(Ahead& ahead) const {
        while (ahead.c.index >= ahead.c.n && ahead.c.b < a.batch) {
            ahead.c.index -= ahead.c.n;
            if (++ahead.c.hq == a.kv_heads * a.query_blocks) {
                ahead.c.hq = 0;
                ++ahead.c.b;
                item_extent<kChunkTokens>(a, ahead.c);
            }
        }
        enter_item(ahead);
    }

    // Starts the copy of the chunk that `ahead` stands at, if it is one of codes, and moves on.
    __device__ __forceinline__ void start_next(Ahead& ahead) const {
        const int per_piece = piece_tokens();
        const int of_chunk = kChunkTokens / per_piece;
        const int page = __shfl_sync(kAll, ahead.pages, ahead.used * of_chunk + lane % of_chunk);
        if (ahead.c.index < ahead.c.codes) {
            const int token = (ahead.c.first + ahead.c.index) * kChunkTokens;
            const int pieces = min(kChunkTokens, ahead.c.length - token + per_piece - 1) / per_piece;
            const int piece_bytes = per_piece / kTileTokens * tile_bytes();
            const uint8_t* const source = ahead.head_base + static_cast<int64_t>(page) * a.page_bytes +
                                          (token & (a.page_size - 1)) / kTileTokens * tile_bytes();
            uint64_t* const barrier = barriers + ahead.stage;
            copy_begin(barrier, pieces * piece_bytes, lane);
            copy_pieces(barrier, ring + ahead.stage * chunk_bytes(), source, piece_bytes, pieces, lane);
            ahead.stage = ahead.stage + 1 == a.stages ? 0 : ahead.stage + 1;
        }
        advance(ahead);
    }

    // ---- a chunk of codes ----

    template <int BITS>
    __device__ __forceinline__ void scores(const uint8_t* chunk, float (&score)[kNT][kTiles][2]) {
        using Words = LaneWords<D, BITS>;
        const int32_t magic[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            int32_t c[kNT][4];
#pragma unroll
            for (int part = 0; part < Words::kParts; ++part) {
                uint32_t low[Words::kPartWords];
                uint32_t sign[Words::kPartSigns > 0 ? Words::kPartSigns : 1];
                Words::load(chunk + tile * tile_bytes(), lane, part, low, sign);
#pragma unroll
                for (int s = 0; s < Words::kPartPairs / 2; ++s) {
                    uint32_t k[4];
                    Unpack<BITS>::pair(low, sign, 2 * s, k[0], k[2]);
                    Unpack<BITS>::pair(low, sign, 2 * s + 1, k[1], k[3]);
#pragma unroll
                    for (int nt = 0; nt < kNT; ++nt) {
                        const uint2 q = query[nt][part * (Words::kPartPairs / 2) + s];
                        const uint32_t b[2] = {q.x, q.y};
                        if (part == 0 && s == 0) {
                            mma_s8s8(c[nt], k, b, magic);
                        } else {
                            mma_s8s8(c[nt], k, b, c[nt]);
                        }
                    }
                }
            }
#pragma unroll
            for (int nt = 0; nt < kNT; ++nt) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float high = __int_as_float(c[nt][2 * i]) - kMagic;
                    const float low = __int_as_float(c[nt][2 * i + 1]) - kMagic;
                    score[nt][tile][i] = fmaf(high, scale_high[nt], fmaf(low, scale_low[nt], scale_constant[nt]));
                }
            }
        }
    }

    template <int BITS>
    __device__ __forceinline__ void values(const uint8_t* chunk, const uint32_t (&weight)[kNT][kTiles],
                                           const float (&keep)[kNT], const float (&add)[kNT]) {
        using Words = LaneWords<D, BITS>;
        const int32_t magic[4] = {kMagicBits, kMagicBits, kMagicBits, kMagicBits};
#pragma unroll
        for (int part = 0; part < Words::kParts; ++part) {
            uint32_t low[kTiles][Words::kPartWords];
            uint32_t sign[kTiles][Words::kPartSigns > 0 ? Words::kPartSigns : 1];
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                Words::load(chunk + tile * tile_bytes(), lane, part, low[tile], sign[tile]);
            }
#pragma unroll
            for (int p = 0; p < Words::kPartPairs; ++p) {
                const int m = part * Words::kPartPairs + p;
                int32_t c[kNT][4];
#pragma unroll
                for (int tile = 0; tile < kTiles; tile += 2) {
                    uint32_t v[4];
                    Unpack<BITS>::pair(low[tile], sign[tile], p, v[0], v[1]);
                    Unpack<BITS>::pair(low[tile + 1], sign[tile + 1], p, v[2], v[3]);
#pragma unroll
                    for (int nt = 0; nt < kNT; ++nt) {
                        const uint32_t b[2] = {weight[nt][tile], weight[nt][tile + 1]};
                        if (tile == 0) {
                            mma_s8u8(c[nt], v, b, magic);
                        } else {
                            mma_s8u8(c[nt], v, b, c[nt]);
                        }
                    }
                }
#pragma unroll
                for (int nt = 0; nt < kNT; ++nt) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const float high = __int_as_float(c[nt][2 * i]) - kMagic;
                        const float low_sum = __int_as_float(c[nt][2 * i + 1]) - kMagic;
                        out[nt][m][i] = fmaf(out[nt][m][i], keep[nt], fmaf(high, 256.0F, low_sum) * add[nt]);
                    }
                }
            }
        }
    }

    __device__ __forceinline__ float over_tokens_max(float x) const { // over the lanes of one query row
        x = fmaxf(x, __shfl_xor_sync(kAll, x, 4));
        x = fmaxf(x, __shfl_xor_sync(kAll, x, 8));
        return fmaxf(x, __shfl_xor_sync(kAll, x, 16));
    }

    // q . mu of an item's row at a position, in units of log2, where there is a mean for every 256 positions.
    __device__ __forceinline__ float offset_at(const Cursor& c, int row, int position) const {
        const int r = min(item_row(c, row), a.group * a.q_len - 1);
        return a.offsets[(static_cast<int64_t>(c.b * a.kv_heads + kv_head(c)) * (a.group * a.q_len) + r) * a.mu_blocks +
                         mean_block(position, a.mu_blocks)];
    }

    __device__ __forceinline__ void code_chunk(const Cursor& c, const uint8_t* chunk) {
        if (a.offsets != nullptr) { // a chunk lies within one block of positions
#pragma unroll
            for (int nt = 0; nt < kNT; ++nt) {
                constant[nt] = offset_at(c, nt * 4 + t, (c.first + c.index) * kChunkTokens);
            }
        }
        float score[kNT][kTiles][2];
        if constexpr (KB != 0) {
            scores<KB == 0 ? 4 : KB>(chunk, score);
        } else {
            switch (a.key_bits) {
            case 2: scores<2>(chunk, score); break;
            case 3: scores<3>(chunk, score); break;
            case 4: scores<4>(chunk, score); break;
            default: scores<8>(chunk, score); break;
            }
        }
        const int key_bytes = side_bytes(D, KB == 0 ? a.key_bits : KB);
        const int value_bits = VB == 0 ? a.value_bits : VB;
        float value_scale[kTiles][2];
        float largest_scale = 0;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
            const uint2 s = *reinterpret_cast<const uint2*>(chunk + tile * tile_bytes() + key_bytes +
                                                            side_bytes(D, value_bits) + g * 8);
            const float2 ks = __half22float2(reinterpret_cast<const __half2&>(s.x));
            const float2 vs = __half22float2(reinterpret_cast<const __half2&>(s.y));
            value_scale[tile][0] = vs.x;
            value_scale[tile][1] = vs.y;
#pragma unroll
            for (int nt = 0; nt < kNT; ++nt) {
                score[nt][tile][0] = fmaf(score[nt][tile][0], ks.x, constant[nt]);
                score[nt][tile][1] = fmaf(score[nt][tile][1], ks.y, constant[nt]);
            }
        }
        if (a.softcap_log2 > 0) {
#pragma unroll
            for (int nt = 0; nt < kNT; ++nt) {
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile) {
                    score[nt][tile][0] = cap(score[nt][tile][0]);
                    score[nt][tile][1] = cap(score[nt][tile][1]);
                }
            }
        }
        const int first = (c.first + c.index) * kChunkTokens;
        if (first < safe_begin || first + kChunkTokens > safe_end) {
            // Hidden from some query: by the future, as an exact row, or by the sliding window. Bytes behind the
            // sequence's end are anything.
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int token = first + tile * kTileTokens + i * 8 + g;
                    if (token >= c.length) {
                        value_scale[tile][i] = 0;
                    }
#pragma unroll
                    for (int nt = 0; nt < kNT; ++nt) {
                        const int end = min(highest[nt], c.length) - a.window;
                        if (token >= end || token < max(lowest[nt], a.sinks)) {
                            score[nt][tile][i] = -INFINITY;
                        }
                    }
                }
            }
        }
        float top[kNT];
#pragma unroll
        for (int nt = 0; nt < kNT; ++nt) {
            top[nt] = score[nt][0][0];
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                largest_scale = fmaxf(largest_scale, value_scale[tile][i]);
#pragma unroll
                for (int nt = 0; nt < kNT; ++nt) {
                    top[nt] = fmaxf(top[nt], score[nt][tile][i]);
                }
            }
        }
        largest_scale = over_tokens_max(largest_scale);
        const float weight_unit = largest_scale > 0 ? kMostWeight / largest_scale : 0;
        uint32_t weight[kNT][kTiles];
        float keep[kNT];
        float add[kNT];
        float weight_sum[kNT];
        bool skip = true;
        const float value_step = value_bits == 4 ? 2.0F : 1.0F;
#pragma unroll
        for (int nt = 0; nt < kNT; ++nt) {
            top[nt] = over_tokens_max(top[nt]);
            skip = skip && (padding[nt] || top[nt] + kSkipLog2 < largest[nt]);
            const float reference = top[nt] == -INFINITY ? 0 : top[nt];
            float p_sum = 0;
            float w_sum = 0;
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                uint32_t bits[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const float p = exp2_fast(score[nt][tile][i] - reference);
                    const float w = p * (value_scale[tile][i] * weight_unit);
                    p_sum += p;
                    w_sum += w;
                    bits[i] = __float_as_uint(w + kWeightMagic);
                }
                // [high byte of both tokens][low byte of both tokens], columns 2t and 2t + 1 of row g
                weight[nt][tile] = transpose8x8(prmt(bits[0], bits[1], 0x4051U));
            }
            const float now = fmaxf(largest[nt], top[nt]);
            const float base = now == -INFINITY ? 0 : now;
            keep[nt] = exp2_fast(largest[nt] - base);
            const float fresh = exp2_fast(top[nt] - base);
            largest[nt] = now;
            sum[nt] = fmaf(sum[nt], keep[nt], p_sum * fresh);
            const float unit = fresh * (largest_scale * (1.0F / kMostWeight));
            add[nt] = unit * value_step;
            weight_sum[nt] = w_sum * unit;
        }
        if (__all_sync(kAll, skip)) {
            return; // `keep` is 1 for every row
        }
        if (value_bits == 4) {
#pragma unroll
            for (int nt = 0; nt < kNT; ++nt) {
                correction[nt] = fmaf(correction[nt], keep[nt], weight_sum[nt]);
            }
        }
        const uint8_t* const side = chunk + key_bytes;
        if constexpr (VB != 0) {
            values<VB == 0 ? 4 : VB>(side, weight, keep, add);
        } else {
            switch (a.value_bits) {
            case 2: values<2>(side, weight, keep, add); break;
            case 3: values<3>(side, weight, keep, add); break;
            case 4: values<4>(side, weight, keep, add); break;
            default: values<8>(side, weight, keep, add); break;
            }
        }
    }

    // ---- in files of their own ----

    __device__ __forceinline__ void exact_chunk(const Cursor& c); // decode_exact.cuh
    __device__ __forceinline__ void merge_warps();                // decode_merge.cuh, all three
    __device__ __forceinline__ void write_out(const Cursor& c);
    __device__ __forceinline__ void share_item(const Cursor& c, int item, int item_begin, int item_end, int per);

    // ---- the block's range ----

    __device__ __forceinline__ void run() {
        const int per_sequence = a.kv_heads * a.query_blocks;
        if (lane == 0) {
#pragma unroll
            for (int s = 0; s < kMostStages; ++s) {
                barrier_init(barriers + s);
            }
            barrier_fence();
        }
        __syncwarp();
        wait_for_previous_kernel();
        // Chunks of all items, and where the range of this block begins. Every warp for itself: no barrier needed.
        Cursor c{};
        int total = 0;
        int shortest = 0x7fffffff;
        int longest = 0;
        for (int b0 = 0; b0 < a.batch; b0 += 32) {
            c.b = b0 + lane;
            item_extent<kChunkTokens>(a, c);
            const bool there = c.b < a.batch;
            total += __reduce_add_sync(kAll, there ? c.n : 0);
            shortest = min(shortest, __reduce_min_sync(kAll, there ? c.n : 0x7fffffff));
            longest = max(longest, __reduce_max_sync(kAll, there ? c.n : 0));
        }
        total *= per_sequence;
        int per = (total + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
        if (shortest == longest) {
            // Equal items: a block's range had better not begin or end within one. Worth a range 1/8 longer.
            const int whole = per <= longest ? (longest + longest / per - 1) / (longest / per)
                                             : (per + longest - 1) / longest * longest;
            per = whole - per <= per / 8 ? whole : per;
            per = max(per, min(WARPS, longest)); // fewer blocks to merge, each warp still has one chunk
        }
        const int begin = static_cast<int>(blockIdx.x) * per;
        const int end = min(begin + per, total);
        if (begin >= end) {
            return; // the whole block
        }
        int before = 0; // chunks of the sequences before c.b
        for (int b0 = 0; b0 < a.batch; b0 += 32) {
            if (a.batch > 32) { // else every lane still has its sequence
                c.b = b0 + lane;
                item_extent<kChunkTokens>(a, c);
            }
            const int own = c.b < a.batch ? c.n : 0;
            int upto = own;
#pragma unroll
            for (int h = 1; h < 32; h *= 2) {
                const int other = __shfl_up_sync(kAll, upto, h);
                upto += lane >= h ? other : 0;
            }
            const unsigned past = __ballot_sync(kAll, (before + upto) * per_sequence > begin);
            if (past != 0) {
                const int at = __ffs(past) - 1;
                before += __shfl_sync(kAll, upto - own, at);
                c.b = b0 + at;
                c.n = __shfl_sync(kAll, c.n, at);
                c.codes = __shfl_sync(kAll, c.codes, at);
                c.first = __shfl_sync(kAll, c.first, at);
                c.length = __shfl_sync(kAll, c.length, at);
                break;
            }
            before += __shfl_sync(kAll, upto, 31);
        }
        const int into = begin - before * per_sequence;
        c.hq = into / c.n;
        c.index = into - c.hq * c.n;

        // This warp's chunks are begin + warp, + WARPS, ...
        Ahead ahead{};
        ahead.c = c;
        ahead.c.index += warp;
        ahead.next = begin + warp;
        ahead.end = end;
        skip_items(ahead);
        look_up(ahead);
        RawQueries raw;
        load_queries(c, raw); // before the flood of copies
        for (int s = 0; s < a.stages && ahead.next < end; ++s) {
            start_next(ahead);
        }
        int stage = 0;
        uint32_t parity = 0;
        int item_begin = begin - c.index;
        for (int at = begin; at < end;) { // items
            const int item_end = item_begin + c.n;
            prepare_queries(c, raw);
            begin_item(c);
            const int stop = min(item_end, end);
            Cursor here = c;
            // from this warp's first chunk at or after `at`
            for (int mine = at + (warp + WARPS - (at - begin) % WARPS) % WARPS; mine < stop; mine += WARPS) {
                here.index = mine - item_begin;
                if (here.index < here.codes) {
                    barrier_wait(barriers + stage, parity);
                    code_chunk(here, ring + stage * chunk_bytes());
                    __syncwarp(); // all lanes have read the stage that the next copy may take
                    if (++stage == a.stages) {
                        stage = 0;
                        parity ^= 1U;
                    }
                } else if (a.sinks > 0 || a.ring > 0) {
                    exact_chunk(here);
                }
                if (ahead.next < end) {
                    start_next(ahead);
                }
            }
            const Cursor done = c;
            const int item = c.b * per_sequence + c.hq;
            at = stop;
            c.index = 0;
            if (at < end) {
                if (++c.hq == per_sequence) {
                    c.hq = 0;
                    ++c.b;
                    item_extent<kChunkTokens>(a, c);
                }
                load_queries(c, raw);
            }
            merge_warps();
            if (item_begin >= begin && item_end <= end) {
                write_out(done);
            } else {
                share_item(done, item, item_begin, item_end, per);
            }
            if (at < end) {
                __syncthreads();
            }
            item_begin = item_end;
        }
    }
};

} // namespace turboquant::cuda

#include "cuda/decode_exact.cuh"
#include "cuda/decode_merge.cuh"

namespace turboquant::cuda {

template <int D, int KB, int VB, int ROWS, int WARPS, int TILES>
__global__ void __launch_bounds__(WARPS * 32, 1) attend_kernel(const __grid_constant__ AttendArgs args) {
    extern __shared__ __align__(128) uint8_t shared[];
    Attend<D, KB, VB, ROWS, WARPS, TILES> attend(args, shared);
    attend.run();
}

} // namespace turboquant::cuda
