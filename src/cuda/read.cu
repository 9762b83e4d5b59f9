// Reading rows back: codes, scales, decoded rows.
#include "cuda/device.cuh"
#include "cuda/encode.h"
#include "cuda/gpu_layout.h"

namespace turboquant::cuda {

namespace {

__device__ __forceinline__ int signed_level(int code, const SideTable& table) {
    if (table.bits == 8) {
        return static_cast<int8_t>(code);
    }
    const int levels = 1 << (table.bits - 1);
    int found = table.first_level;
    for (int s = 0; s < (code & (levels - 1)); ++s) {
        found += table.step[s];
    }
    const int level = found & 255;
    return (code & levels) != 0 ? -level : level;
}

// A warp: one row of one side and head.
template <int D>
__global__ void __launch_bounds__(256) read_kernel(const __grid_constant__ ReadArgs a) {
    constexpr int kOwn = D / 32;
    const int lane = threadIdx.x % 32;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
    if (row >= 2 * a.n * a.cache.kv_heads) {
        return;
    }
    const int head = static_cast<int>(row % a.cache.kv_heads);
    const int64_t i = row / a.cache.kv_heads % a.n;
    const int side = static_cast<int>(row / a.cache.kv_heads / a.n);
    const SideTable& table = a.cache.side[side];
    int64_t slot = a.slots[i];
    slot = slot < a.cache.n_slots ? slot : -1;
    int code[kOwn];
    uint16_t scale = 0;
    const int key_bytes = side_bytes(D, a.cache.side[0].bits);
    if (slot >= 0) {
        const int64_t tiles = a.cache.page_size / kTileTokens;
        const uint8_t* const tile = a.cache.pages + slot / a.cache.page_size * a.cache.page_bytes +
                                    (head * tiles + slot % a.cache.page_size / kTileTokens) * a.cache.tile_bytes;
        const int token = static_cast<int>(slot % kTileTokens);
        scale = reinterpret_cast<const uint16_t*>(tile + key_bytes +
                                                  side_bytes(D, a.cache.side[1].bits))[scale_index(token) + 2 * side];
        const uint8_t* const base = tile + (side == 0 ? 0 : key_bytes);
        const int low = low_width(table.bits);
        const auto field = [&](const uint8_t* plane, int width, const CodePlace& place) {
            const WordPlace w = word_place(width, place.group, place.element);
            const auto word = *reinterpret_cast<const uint32_t*>(plane + word_offset(D, width, place.lane, w.word));
            return static_cast<int>(word >> w.bit & ((1U << width) - 1U));
        };
        for (int e = 0; e < kOwn; ++e) {
            const int channel = lane * kOwn + e;
            const CodePlace place = side == 0 ? key_place(D, token, channel) : value_place(token, channel);
            code[e] = field(base, low, place);
            if (table.bits == 3) {
                code[e] |= field(base + plane_bytes(D, 2), 1, place) << 2;
            }
        }
    } else {
        for (int e = 0; e < kOwn; ++e) {
            code[e] = 0;
        }
    }
    if (a.codes != nullptr) {
        for (int e = 0; e < kOwn; ++e) {
            a.codes[row * D + lane * kOwn + e] = static_cast<uint8_t>(code[e]);
        }
    }
    if (a.scales != nullptr && lane == 0) {
        a.scales[row] = scale;
    }
    if (a.rows == nullptr) {
        return;
    }
    const float s = __half2float(__ushort_as_half(scale));
    float y[kOwn];
    for (int e = 0; e < kOwn; ++e) {
        y[e] = s * static_cast<float>(signed_level(code[e], table));
    }
    if (a.rotated == 0) {
        hadamard_warp<D>(y, lane);
        for (int e = 0; e < kOwn; ++e) {
            const int channel = lane * kOwn + e;
            y[e] *= (a.cache.signs[channel / 32] >> (channel % 32) & 1U) != 0 ? -1.0F : 1.0F;
            if (side == 0 && a.cache.lambda != nullptr) {
                y[e] /= a.cache.lambda[head * D + channel];
            }
            if (side == 0 && a.cache.mu != nullptr && slot >= 0) {
                const int block = a.cache.mu_blocks > 0 ? mean_block(a.positions[i], a.cache.mu_blocks) : 0;
                y[e] += a.cache.mu[(static_cast<int64_t>(block) * a.cache.kv_heads + head) * D + channel];
            }
        }
    }
    for (int e = 0; e < kOwn; ++e) {
        store_element(a.rows, row * D + lane * kOwn + e, a.type, y[e]);
    }
}

} // namespace

cudaError_t launch_read(const ReadArgs& args, int head_size, cudaStream_t stream) {
    const auto blocks = static_cast<unsigned>((2 * args.n * args.cache.kv_heads + 7) / 8);
    switch (head_size) {
    case 64: read_kernel<64><<<blocks, 256, 0, stream>>>(args); break;
    case 128: read_kernel<128><<<blocks, 256, 0, stream>>>(args); break;
    default: read_kernel<256><<<blocks, 256, 0, stream>>>(args); break;
    }
    return cudaGetLastError();
}

} // namespace turboquant::cuda
