// Codes and exact rows to the fp16 images that the flash loop reads. A block: the keys or the values of one image, a warp
// 16 tokens of them.
#include "cuda/device.cuh"
#include "cuda/gpu_layout.h"
#include "cuda/prefill.h"
#include "cuda/prefill_extent.cuh"
#include "cuda/unpack.cuh"

namespace turboquant::cuda {

namespace {

constexpr int kImageThreads = kImageTokens / kTileTokens * 32;

// Byte of 16-byte chunk `chunk` of row `row` in an operand of 128-byte rows.
__device__ __forceinline__ int swizzled(int row, int chunk) {
    return row * 128 + ((chunk ^ (row & 7)) << 4);
}

// Two of four signed bytes as levels / kImageUnit. `select`: 0x4140 for bytes 0 and 1, and so on.
template <int BITS>
__device__ __forceinline__ __half2 level_pair(uint32_t shifted, uint32_t select) {
    // 0x6400 | u is 1024 + u, exactly; u = byte + 128
    const uint32_t bits = prmt(shifted, 0x64646464U, select);
    const __half2 whole = __hsub2(reinterpret_cast<const __half2&>(bits), __float2half2_rn(1152.0F));
    return __hfma2(whole, __float2half2_rn(Unpack<BITS>::kStep / kImageUnit),
                   __float2half2_rn(Unpack<BITS>::kOffset / kImageUnit)); // exact
}

__device__ __forceinline__ uint32_t scaled(__half2 level, __half2 scale) {
    // A saturated scale times the largest level may pass fp16's end. And where the bytes behind a sequence's end make
    // NaN, minimum and maximum give the other operand: probability 0 times this is 0.
    const __half2 most = __float2half2_rn(65504.0F);
    const __half2 x = __hmax2(__hmin2(__hmul2(level, scale), most), __hneg2(most));
    return reinterpret_cast<const uint32_t&>(x);
}

template <int D, int BITS>
__device__ __forceinline__ void key_codes(const uint8_t* side, int lane, uint32_t scales, int row0, uint8_t* image) {
    using Words = LaneWords<D, BITS>;
    const auto both = reinterpret_cast<const __half2&>(scales); // of tokens g and g + 8
#pragma unroll
    for (int part = 0; part < Words::kParts; ++part) {
        uint32_t low[Words::kPartWords];
        uint32_t sign[Words::kPartSigns > 0 ? Words::kPartSigns : 1];
        Words::load(side, lane, part, low, sign);
#pragma unroll
        for (int p = 0; p < Words::kPartPairs; ++p) {
            // Pair P: 8 neighbouring channels of token g + 8 (P % 2) (gpu_layout.h).
            const int pair = part * Words::kPartPairs + p;
            uint32_t a;
            uint32_t b;
            Unpack<BITS>::pair(low, sign, p, a, b);
            a ^= 0x80808080U;
            b ^= 0x80808080U;
            const __half2 scale = pair % 2 == 0 ? __low2half2(both) : __high2half2(both);
            const uint4 eight = {
                scaled(level_pair<BITS>(a, 0x4140U), scale), scaled(level_pair<BITS>(a, 0x4342U), scale),
                scaled(level_pair<BITS>(b, 0x4140U), scale), scaled(level_pair<BITS>(b, 0x4342U), scale)};
            const int chunk = lane % 4 * (D / 32) + pair / 2;
            const int row = row0 + lane / 4 + 8 * (pair % 2);
            *reinterpret_cast<uint4*>(image + chunk / 8 * (kImageTokens * 128) + swizzled(row, chunk % 8)) = eight;
        }
    }
}

template <int D, int BITS>
__device__ __forceinline__ void value_codes(const uint8_t* side, int lane, uint32_t early, uint32_t late, int token0,
                                            uint8_t* image) {
    using Words = LaneWords<D, BITS>;
    const auto early_scale = reinterpret_cast<const __half2&>(early); // of tokens 2t and 2t + 1
    const auto late_scale = reinterpret_cast<const __half2&>(late);   // of tokens 2t + 8 and 2t + 9
#pragma unroll
    for (int part = 0; part < Words::kParts; ++part) {
        uint32_t low[Words::kPartWords];
        uint32_t sign[Words::kPartSigns > 0 ? Words::kPartSigns : 1];
        Words::load(side, lane, part, low, sign);
#pragma unroll
        for (int p = 0; p < Words::kPartPairs; ++p) {
            // Pair P: channels 16 P + g and 16 P + 8 + g, tokens 2t, 2t + 8, 2t + 1, 2t + 9.
            const int pair = part * Words::kPartPairs + p;
            uint32_t group[2];
            Unpack<BITS>::pair(low, sign, p, group[0], group[1]);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t u = group[i] ^ 0x80808080U;
                const int row = pair * 16 + i * 8 + lane / 4;
                const int at = lane % 4 * 4;
                *reinterpret_cast<uint32_t*>(image + swizzled(row, token0 / 8) + at) =
                    scaled(level_pair<BITS>(u, 0x4240U), early_scale);
                *reinterpret_cast<uint32_t*>(image + swizzled(row, token0 / 8 + 1) + at) =
                    scaled(level_pair<BITS>(u, 0x4341U), late_scale);
            }
        }
    }
}

template <int D>
__device__ __forceinline__ void code_image(const PrefillArgs& a, const Extent& e, int b, int head, int first, int side,
                                           uint8_t* image) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int g = lane / 4;
    const int t = lane % 4;
    const int token0 = first + warp * kTileTokens;
    const bool there = token0 < e.length;
    const int page = there ? a.page_table[b * a.page_table_stride + (token0 >> a.page_shift)] : 0;
    // A tile behind the sequence's end: any bytes will do.
    const uint8_t* const tile =
        a.pages + page * a.page_bytes +
        (head * (a.page_size / kTileTokens) + (there ? (token0 & (a.page_size - 1)) / kTileTokens : 0)) *
            static_cast<int64_t>(a.tile_bytes);
    const int key_bytes = side_bytes(D, a.key_bits);
    const auto* const scales = reinterpret_cast<const uint2*>(tile + key_bytes + side_bytes(D, a.value_bits));
    const int row0 = warp * kTileTokens;
    if (side == 0) {
        const uint32_t key_scales = scales[g].x;
        switch (a.key_bits) {
        case 2: key_codes<D, 2>(tile, lane, key_scales, row0, image); break;
        case 3: key_codes<D, 3>(tile, lane, key_scales, row0, image); break;
        case 4: key_codes<D, 4>(tile, lane, key_scales, row0, image); break;
        default: key_codes<D, 8>(tile, lane, key_scales, row0, image); break;
        }
        return;
    }
    const uint32_t s0 = scales[2 * t].y; // token 2t low, 2t + 8 high
    const uint32_t s1 = scales[2 * t + 1].y;
    const uint32_t early = prmt(s0, s1, 0x5410U);
    const uint32_t late = prmt(s0, s1, 0x7632U);
    switch (a.value_bits) {
    case 2: value_codes<D, 2>(tile + key_bytes, lane, early, late, row0, image); break;
    case 3: value_codes<D, 3>(tile + key_bytes, lane, early, late, row0, image); break;
    case 4: value_codes<D, 4>(tile + key_bytes, lane, early, late, row0, image); break;
    default: value_codes<D, 8>(tile + key_bytes, lane, early, late, row0, image); break;
    }
}

template <int D>
__device__ __forceinline__ void exact_image(const PrefillArgs& a, const Extent& e, int b, int head, int first, int side,
                                            uint8_t* image) {
    const int64_t slot = static_cast<int64_t>(a.sequence_slots[b]) * (a.sinks + a.ring);
    const uint16_t* const rows = side == 0 ? a.exact_keys : a.exact_values;
    const __half2 unit = __float2half2_rn(1 / kImageUnit);
    for (int at = static_cast<int>(threadIdx.x); at < kImageTokens * D / 8; at += kImageThreads) {
        const int row = at % kImageTokens; // neighbours write neighbouring tokens of the values
        const int chunk = at / kImageTokens;
        uint4 eight{};
        if (first + row < e.n_exact) {
            const int p = e.position(first + row);
            const int entry = p < a.sinks ? p : a.sinks + (p - a.sinks) % a.ring;
            eight = *reinterpret_cast<const uint4*>(rows + ((slot + entry) * a.kv_heads + head) * D + chunk * 8);
        }
        auto* const x = reinterpret_cast<__half2*>(&eight);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[i] = __hmul2(x[i], unit);
        }
        if (side == 0) {
            *reinterpret_cast<uint4*>(image + chunk / 8 * (kImageTokens * 128) + swizzled(row, chunk % 8)) = eight;
            continue;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            *reinterpret_cast<__half*>(image + swizzled(chunk * 8 + i, row / 8) + row % 8 * 2) =
                i % 2 == 0 ? __low2half(x[i / 2]) : __high2half(x[i / 2]);
        }
    }
}

template <int D>
__global__ void __launch_bounds__(kImageThreads) images_kernel(const __grid_constant__ PrefillArgs a) {
    extern __shared__ __align__(16) uint8_t image[];
    const int item = a.first_item + static_cast<int>(blockIdx.y);
    const int b = item / a.kv_heads;
    const int head = item % a.kv_heads;
    const Extent e(a, b);
    const int index = static_cast<int>(blockIdx.x);
    const bool exact = index >= a.code_images;
    const int first = (exact ? index - a.code_images : index) * kImageTokens;
    // The flash loop reads whole tiles: what it will not read is left out.
    const int tile = first / kMostTileTokens * kMostTileTokens;
    const int end = exact ? e.n_exact : e.code_end(a, e.length);
    const int begin = exact ? 0 : e.lowest(a, max(e.first_end, 0));
    if (tile >= end || tile + kMostTileTokens <= begin) {
        return;
    }
    const int side = static_cast<int>(blockIdx.z);
    if (exact) {
        exact_image<D>(a, e, b, head, first, side, image);
    } else {
        code_image<D>(a, e, b, head, first, side, image);
    }
    __syncthreads();
    constexpr int kBytes = D * 128;
    const int64_t at = static_cast<int64_t>(blockIdx.y) * (a.code_images + a.exact_images) + index;
    auto* const to = reinterpret_cast<uint4*>(a.images + (2 * at + side) * kBytes);
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < kBytes / 16; i += kImageThreads) {
        to[i] = reinterpret_cast<const uint4*>(image)[i];
    }
}

template <int D>
cudaError_t launch(const PrefillArgs& args, cudaStream_t stream) {
    constexpr int kBytes = D * 128;
    const cudaError_t error =
        cudaFuncSetAttribute(images_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error != cudaSuccess) {
        return error;
    }
    const dim3 grid(static_cast<unsigned>(args.code_images + args.exact_images), static_cast<unsigned>(args.items), 2);
    images_kernel<D><<<grid, kImageThreads, kBytes, stream>>>(args);
    return cudaGetLastError();
}

} // namespace

cudaError_t launch_images(const PrefillArgs& args, int head_size, cudaStream_t stream) {
    static_assert(image_bytes(128) == size_t{2} * 128 * 128);
    return head_size == 64    ? launch<64>(args, stream)
           : head_size == 128 ? launch<128>(args, stream)
                              : launch<256>(args, stream);
}

} // namespace turboquant::cuda
