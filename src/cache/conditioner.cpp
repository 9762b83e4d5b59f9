#include "cache/conditioner.h"

#include <algorithm>

namespace turboquant {

void Conditioner::set(const Conditioning& conditioning, const Rotation& rotation, int kv_heads) {
    conditioning_ = storable(conditioning);
    head_size_ = rotation.head_size();
    id_ = turboquant::conditioning_id(conditioning_, head_size_, kv_heads);
    record_.clear();
    if (id_ != 0) {
        record_ = write_conditioning(conditioning_, head_size_, kv_heads);
    }
    const auto head_size = static_cast<size_t>(head_size_);
    const size_t elements = head_size * static_cast<size_t>(kv_heads);
    encode_factor_.assign(elements + kConditionerPadding, 0);
    constant_mean_.assign(elements + kConditionerPadding, 0);
    for (size_t i = 0; i < elements; ++i) {
        const float lambda = conditioning_.lambda.empty() ? 1.0F : conditioning_.lambda[i];
        encode_factor_[i] = rotation.signs()[i % head_size] * lambda;
    }
    has_mean_ = std::any_of(conditioning_.mu.begin(), conditioning_.mu.end(), [](float m) { return m != 0; });
    n_pairs_ = has_mean_ ? static_cast<int>(conditioning_.rope.size()) : 0;
    phases_.clear();
    pair_mean_.assign(size_t{2} * static_cast<size_t>(n_pairs_) * static_cast<size_t>(kv_heads), 0);
    if (!has_mean_) {
        return;
    }
    block_mean(conditioning_, head_size_, kv_heads, 0, constant_mean_.data());
    for (int head = 0; head < kv_heads; ++head) {
        float* const mean = constant_mean_.data() + static_cast<size_t>(head) * head_size;
        float* const pair_mean = pair_mean_.data() + static_cast<ptrdiff_t>(head) * 2 * n_pairs_;
        for (int i = 0; i < n_pairs_; ++i) {
            const RopePair& pair = conditioning_.rope[static_cast<size_t>(i)];
            pair_mean[i] = mean[pair.first];
            pair_mean[n_pairs_ + i] = mean[pair.second];
            mean[pair.first] = 0;
            mean[pair.second] = 0;
        }
    }
}

void Conditioner::add_block(int block) {
    const size_t at = phases_.size();
    phases_.resize(at + static_cast<size_t>(2 * n_pairs_));
    if (n_pairs_ > 0) {
        block_phases(conditioning_.rope, block, phases_.data() + at, phases_.data() + at + n_pairs_);
    }
}

void Conditioner::head_mean(int kv_head, int entry, float* out) const {
    std::copy_n(constant_mean_.data() + static_cast<ptrdiff_t>(kv_head) * head_size_, head_size_, out);
    const float* const mean = n_pairs_ > 0 ? pair_mean(kv_head) : nullptr;
    const float* const phase = n_pairs_ > 0 ? phases(entry) : nullptr;
    for (int i = 0; i < n_pairs_; ++i) {
        const RopePair& pair = conditioning_.rope[static_cast<size_t>(i)];
        const float cosine = phase[i];
        const float sine = phase[n_pairs_ + i];
        out[pair.first] = mean[i] * cosine - mean[n_pairs_ + i] * sine;
        out[pair.second] = mean[i] * sine + mean[n_pairs_ + i] * cosine;
    }
}

} // namespace turboquant
