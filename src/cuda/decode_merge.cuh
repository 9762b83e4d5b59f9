// From the warps' softmax states to an output row: within a block, then between blocks. Part of decode_kernel.cuh.
// Internal.
#pragma once

namespace turboquant::cuda {

// The warps' states into merged[] (not divided by the sum) and block_state[]. The whole block; ends in a barrier. The
// merge buffer is free after the first barrier: until then it may hold exact rows' probabilities.
template <int D, int KB, int VB, int ROWS, int WARPS, int TILES>
__device__ __forceinline__ void Attend<D, KB, VB, ROWS, WARPS, TILES>::merge_warps() {
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt) {
#pragma unroll
        for (int h = 4; h < 32; h *= 2) {
            sum[nt] += __shfl_xor_sync(kAll, sum[nt], h);
            correction[nt] += __shfl_xor_sync(kAll, correction[nt], h);
        }
        if (g == 0) {
            float* const s = warp_state + (warp * ROWS + nt * 4 + t) * 2;
            s[0] = largest[nt];
            s[1] = sum[nt];
        }
    }
    __syncthreads();
    float factor[kNT];
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt) {
        const int row = nt * 4 + t;
        float top = -INFINITY;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            top = fmaxf(top, warp_state[(w * ROWS + row) * 2]);
        }
        const float base = top == -INFINITY ? 0 : top;
        factor[nt] = exp2_fast(largest[nt] - base);
        if (warp == 0 && g == 0) {
            float total = 0;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                total += warp_state[(w * ROWS + row) * 2 + 1] * exp2_fast(warp_state[(w * ROWS + row) * 2] - base);
            }
            block_state[row * 2] = top;
            block_state[row * 2 + 1] = total;
        }
    }
    constexpr int kRoundTiles = F::merge_tiles(WARPS);
    constexpr int kRoundChannels = kRoundTiles * 16;
    constexpr int kStride = F::merge_stride(WARPS);
#pragma unroll
    for (int round = 0; round < kOutTiles / kRoundTiles; ++round) {
#pragma unroll
        for (int nt = 0; nt < kNT; ++nt) {
#pragma unroll
            for (int m = 0; m < kRoundTiles; ++m) {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    merge[(warp * ROWS + nt * 4 + t) * kStride + m * 16 + i * 8 + g] =
                        (out[nt][round * kRoundTiles + m][i] + correction[nt]) * factor[nt];
                }
            }
        }
        __syncthreads();
        for (int at = threadIdx.x; at < ROWS * kRoundChannels; at += WARPS * 32) {
            const int row = at / kRoundChannels;
            const int channel = at % kRoundChannels;
            float total = 0;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                total += merge[(w * ROWS + row) * kStride + channel];
            }
            merged[row * D + round * kRoundChannels + channel] = total;
        }
        __syncthreads();
    }
}

// merged[] and block_state[] are complete: rotate back, divide, write. The whole block.
template <int D, int KB, int VB, int ROWS, int WARPS, int TILES>
__device__ __forceinline__ void Attend<D, KB, VB, ROWS, WARPS, TILES>::write_out(const Cursor& c) {
    for (int row = warp; row < ROWS; row += WARPS) {
        const int r = item_row(c, row);
        if (r >= a.group * a.q_len) {
            continue;
        }
        const int head = kv_head(c) * a.group + r % a.group;
        const float top = block_state[row * 2];
        float total = block_state[row * 2 + 1];
        if (a.sink_logits != nullptr && total > 0) {
            total += exp2f(a.sink_logits[head] * 1.4426950408889634F - top);
        }
        const float inverse = total > 0 ? 1.0F / total : 0;
        float y[kOwn];
#pragma unroll
        for (int e = 0; e < kOwn; ++e) {
            y[e] = merged[row * D + lane * kOwn + e] * inverse;
        }
        hadamard_warp<D>(y, lane);
        const int64_t at = c.b * a.out_batch + r / a.group * a.out_query + head * a.out_head;
#pragma unroll
        for (int e = 0; e < kOwn; ++e) {
            const int channel = lane * kOwn + e;
            store_element(a.out, at + channel, a.type, y[e] * rotation_sign(e));
        }
    }
}

// This block's share of an item that other blocks share too; the last one to come merges all. The whole block.
// The item's chunks are [item_begin, item_end) of all; a block has `per` chunks.
template <int D, int KB, int VB, int ROWS, int WARPS, int TILES>
__device__ __forceinline__ void Attend<D, KB, VB, ROWS, WARPS, TILES>::share_item(const Cursor& c, int item, int item_begin, int item_end, int per) {
    constexpr int kStride = D + 4; // a row: channels, (max, sum), padding
    const int first = item_begin / per;
    const int n = (item_end - 1) / per - first + 1;
    const auto slot = [&](int i) { // an item that began before the block has its first slot
        const int block = first + i;
        return a.partial + (2 * block + (item_begin < block * per ? 0 : 1)) * static_cast<int64_t>(ROWS * kStride);
    };
    float* const own = slot(blockIdx.x - first);
    for (int at = threadIdx.x; at < ROWS * D / 4; at += WARPS * 32) {
        *reinterpret_cast<float4*>(own + at / (D / 4) * kStride + at % (D / 4) * 4) =
            reinterpret_cast<const float4*>(merged)[at];
    }
    if (threadIdx.x < ROWS) {
        *reinterpret_cast<float2*>(own + threadIdx.x * kStride + D) =
            reinterpret_cast<const float2*>(block_state)[threadIdx.x];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        *flag = count_in(a.counters + item); // with the barriers on both sides: all writes before, all reads after
    }
    __syncthreads();
    if (*flag != n - 1) {
        return;
    }
    if (threadIdx.x == 0) {
        a.counters[item] = 0; // for the next call
    }
    // A warp takes a row and every kSplit-th block; the sums of a row meet in the merge buffer. What the blocks left is
    // asked for first, as far as registers go: one trip to memory instead of three.
    constexpr int kSplit = WARPS / ROWS > 0 ? WARPS / ROWS : 1;
    constexpr int kVectors = kOwn < 4 ? 1 : kOwn / 4;
    constexpr int kEarly = kVectors == 1 ? 8 : 4;
    static_assert(kSplit * ROWS * D * 4 + kSplit * ROWS * 8 <= F::merge_bytes(WARPS));
    float* const split_state = merge + kSplit * ROWS * D;
    for (int job = warp; job < kSplit * ROWS; job += WARPS) {
        const int row = job % ROWS;
        const int part = job / ROWS;
        const auto load = [&](int i, int v) {
            const int at = (v * 32 + lane) * 4;
            return i < n && at < D ? __ldcg(reinterpret_cast<const float4*>(slot(i) + row * kStride + at))
                                   : float4{0, 0, 0, 0};
        };
        const auto state_of = [&](int i) {
            return i < n ? __ldcg(reinterpret_cast<const float2*>(slot(i) + row * kStride + D)) : float2{-INFINITY, 0};
        };
        float4 early[kEarly][kVectors];
        float2 early_state[kEarly];
#pragma unroll
        for (int k = 0; k < kEarly; ++k) {
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                early[k][v] = load(part + k * kSplit, v);
            }
            early_state[k] = state_of(part + k * kSplit);
        }
        float top = -INFINITY;
        for (int i = lane; i < n; i += 32) {
            top = fmaxf(top, __ldcg(slot(i) + row * kStride + D));
        }
#pragma unroll
        for (int h = 16; h > 0; h /= 2) {
            top = fmaxf(top, __shfl_xor_sync(kAll, top, h));
        }
        const float base = top == -INFINITY ? 0 : top;
        float total = 0;
        float4 y[kVectors] = {};
        const auto add = [&](const float2& state, const float4(&x)[kVectors]) {
            const float factor = exp2_fast(state.x - base);
            total = fmaf(state.y, factor, total);
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                y[v].x = fmaf(x[v].x, factor, y[v].x);
                y[v].y = fmaf(x[v].y, factor, y[v].y);
                y[v].z = fmaf(x[v].z, factor, y[v].z);
                y[v].w = fmaf(x[v].w, factor, y[v].w);
            }
        };
#pragma unroll
        for (int k = 0; k < kEarly; ++k) {
            add(early_state[k], early[k]);
        }
#pragma unroll 4
        for (int i = part + kEarly * kSplit; i < n; i += kSplit) {
            float4 x[kVectors];
#pragma unroll
            for (int v = 0; v < kVectors; ++v) {
                x[v] = load(i, v);
            }
            add(state_of(i), x);
        }
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
            const int at = (v * 32 + lane) * 4;
            if (at < D) {
                *reinterpret_cast<float4*>(merge + job * D + at) = y[v];
            }
        }
        if (lane == 0) {
            split_state[job * 2] = top;
            split_state[job * 2 + 1] = total;
        }
    }
    __syncthreads();
    for (int at = threadIdx.x; at < ROWS * D; at += WARPS * 32) {
        float total = 0;
#pragma unroll
        for (int part = 0; part < kSplit; ++part) {
            total += merge[part * ROWS * D + at];
        }
        merged[at] = total;
    }
    if (threadIdx.x < ROWS) {
        float total = 0;
#pragma unroll
        for (int part = 0; part < kSplit; ++part) {
            total += split_state[(part * ROWS + threadIdx.x) * 2 + 1];
        }
        block_state[threadIdx.x * 2] = split_state[threadIdx.x * 2];
        block_state[threadIdx.x * 2 + 1] = total;
    }
    __syncthreads();
    write_out(c);
}

} // namespace turboquant::cuda
