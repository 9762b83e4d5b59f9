// Rows kept exact (fp16 in the rotated basis), in the same pass as the codes. Part of decode_kernel.cuh. Internal.
#pragma once

namespace turboquant::cuda {

// Sinks first, then the window's rows. fp16 in the rotated basis, one row a lane for scores.
template <int D, int KB, int VB, int ROWS, int WARPS, int TILES>
__device__ __forceinline__ void Attend<D, KB, VB, ROWS, WARPS, TILES>::exact_chunk(const Cursor& c) {
    const int first_end = a.causal != 0 ? c.length - a.q_len + 1 : c.length;
    const int n_sinks = min(a.sinks, c.length);
    const int window_begin = max(a.window > 0 ? max(first_end - a.window, 0) : c.length, a.sinks);
    const int base = (c.index - c.codes) * kExactChunkRows;
    const int total = n_sinks + max(c.length - window_begin, 0);
    const int mine = base + lane;
    const int position = mine < n_sinks ? mine : window_begin + mine - n_sinks;
    const bool there = mine < total;
    const int64_t per_slot = a.sinks + a.ring;
    const auto row_of = [&](int p) {
        const int entry = p < a.sinks ? p : a.sinks + (p - a.sinks) % max(a.ring, 1);
        return ((static_cast<int64_t>(a.sequence_slots[c.b]) * per_slot + entry) * a.kv_heads + kv_head(c)) * D;
    };
    const int64_t own = there ? row_of(position) : 0;
    float dot[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        dot[r] = 0;
    }
    if (there) {
        const auto* const key = reinterpret_cast<const uint4*>(a.exact_keys + own);
        for (int e = 0; e < D / 8; ++e) {
            const uint4 eight = key[e];
            const uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 k = __half22float2(reinterpret_cast<const __half2&>(pairs[i]));
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    const float2 q = *reinterpret_cast<const float2*>(rotated + r * D + e * 8 + i * 2);
                    dot[r] = fmaf(q.x, k.x, fmaf(q.y, k.y, dot[r]));
                }
            }
        }
    }
    float row_top[ROWS];
    float row_sum[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const float* const p = params + r * 8;
        float score = fmaf(dot[r], a.scale_log2, a.offsets != nullptr ? offset_at(c, r, position) : p[2]);
        if (a.softcap_log2 > 0) {
            score = cap(score);
        }
        const int end = min(__float_as_int(p[4]), c.length);
        const bool seen = there && position < end && position >= __float_as_int(p[3]) &&
                          (position < a.sinks || (a.window > 0 && position >= end - a.window));
        score = seen ? score : -INFINITY;
        float top = score;
#pragma unroll
        for (int h = 16; h > 0; h /= 2) {
            top = fmaxf(top, __shfl_xor_sync(kAll, top, h));
        }
        const float probability = exp2_fast(score - (top == -INFINITY ? 0 : top));
        float total_p = probability;
#pragma unroll
        for (int h = 16; h > 0; h /= 2) {
            total_p += __shfl_xor_sync(kAll, total_p, h);
        }
        exact_p[r * 32 + lane] = probability;
        row_top[r] = top;
        row_sum[r] = total_p;
    }
    __syncwarp();
    float fresh[kNT];
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt) {
        float top = row_top[nt * 4];
        float total_p = row_sum[nt * 4];
#pragma unroll
        for (int r = 1; r < 4; ++r) {
            top = t == r ? row_top[nt * 4 + r] : top;
            total_p = t == r ? row_sum[nt * 4 + r] : total_p;
        }
        const float now = fmaxf(largest[nt], top);
        const float base_now = now == -INFINITY ? 0 : now;
        const float keep = exp2_fast(largest[nt] - base_now);
        fresh[nt] = exp2_fast(top - base_now);
        largest[nt] = now;
        // The sum is spread over the lanes of a row; one of them takes this chunk's.
        sum[nt] = fmaf(sum[nt], keep, g == 0 ? total_p * fresh[nt] : 0.0F);
        correction[nt] *= keep;
#pragma unroll
        for (int m = 0; m < kOutTiles; ++m) {
            out[nt][m][0] *= keep;
            out[nt][m][1] *= keep;
        }
    }
    for (int j = 0; j < min(total - base, kExactChunkRows); ++j) {
        const int64_t row = __shfl_sync(kAll, own, j);
        float p[kNT];
#pragma unroll
        for (int nt = 0; nt < kNT; ++nt) {
            p[nt] = exact_p[(nt * 4 + t) * 32 + j] * fresh[nt];
        }
        const __half* const value = reinterpret_cast<const __half*>(a.exact_values + row);
#pragma unroll
        for (int m = 0; m < kOutTiles; ++m) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float v = __half2float(value[m * 16 + i * 8 + g]);
#pragma unroll
                for (int nt = 0; nt < kNT; ++nt) {
                    out[nt][m][i] = fmaf(p[nt], v, out[nt][m][i]);
                }
            }
        }
    }
    __syncwarp();
}

} // namespace turboquant::cuda
