// The fixed rotation: which blocks, which signs. The transform itself is in hadamard.inc.
#include "codec/codec_tables.h"
#include "turboquant/codec.h"

#include <algorithm>
#include <string>

namespace turboquant {

int largest_block(int limit) {
    int best = 4;
    for (const int base : {4, 12, 20}) {
        for (int size = base; size <= limit; size *= 2) {
            best = std::max(best, size);
        }
    }
    return best;
}

float rotation_sign(int size, int index) {
    // The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
    uint64_t z = (static_cast<uint64_t>(size) << 32 | static_cast<uint64_t>(index)) + 0x9e3779b97f4a7c15U;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebU;
    z ^= z >> 31;
    return (z >> 63) != 0 ? -1.0F : 1.0F;
}

Status Rotation::create(int head_size, Rotation& out) {
    if (head_size < 4 || head_size > kMaxHeadSize || head_size % 4 != 0) {
        return invalid("rotation: head size " + std::to_string(head_size) + " is not a multiple of 4 in 4.." +
                       std::to_string(kMaxHeadSize));
    }
    Rotation r;
    r.head_size_ = head_size;
    r.signs_.reserve(static_cast<size_t>(head_size));
    for (int offset = 0; offset < head_size;) {
        const int size = largest_block(head_size - offset);
        r.blocks_.push_back({offset, size});
        for (int i = 0; i < size; ++i) {
            r.signs_.push_back(rotation_sign(size, i));
        }
        offset += size;
    }
    out = std::move(r);
    return {};
}

void Rotation::forward(const float* x, float* y) const {
    const CodecKernels& kernels = default_kernels();
    alignas(64) float block_values[kMaxHeadSize];
    for (const RotationBlock& block : blocks_) {
        for (int i = 0; i < block.size; ++i) {
            block_values[i] = x[block.offset + i] * signs_[static_cast<size_t>(block.offset) + static_cast<size_t>(i)];
        }
        std::fill(block_values + block.size, block_values + round_up(block.size, kVectorPadding), 0.0F);
        kernels.hadamard(block_values, block.size, false);
        std::copy_n(block_values, block.size, y + block.offset);
    }
}

void Rotation::inverse(const float* y, float* x) const {
    const CodecKernels& kernels = default_kernels();
    alignas(64) float block_values[kMaxHeadSize];
    for (const RotationBlock& block : blocks_) {
        std::copy_n(y + block.offset, block.size, block_values);
        std::fill(block_values + block.size, block_values + round_up(block.size, kVectorPadding), 0.0F);
        kernels.hadamard(block_values, block.size, true);
        for (int i = 0; i < block.size; ++i) {
            x[block.offset + i] = block_values[i] * signs_[static_cast<size_t>(block.offset) + static_cast<size_t>(i)];
        }
    }
}

} // namespace turboquant
