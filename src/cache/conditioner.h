// What a store derives from its conditioning: per channel factors for the encoder, the means of position blocks.
// Internal.
#pragma once

#include "turboquant/codec.h"
#include "turboquant/conditioning.h"

#include <cstdint>
#include <vector>

namespace turboquant {

inline constexpr int kConditionerPadding = 16; // entries behind the channels that vector code may read

// Position blocks are known by their place in the store's list of blocks met so far ("entry"), so that the tables are
// as long as that list and not as the largest position.
class Conditioner {
public:
    // Checked sizes. May throw std::bad_alloc.
    void set(const Conditioning& conditioning, const Rotation& rotation, int kv_heads);
    // Appends the phases of the next entry.
    void add_block(int block);

    const Conditioning& conditioning() const { return conditioning_; }
    uint32_t id() const { return id_; }
    const std::vector<uint8_t>& record() const { return record_; } // write_conditioning(); empty where id() is 0

    // [kv_head][channel] and padding. sign * lambda: rotated = H (factor * (x - mean)) / sqrt(n).
    const std::vector<float>& encode_factor() const { return encode_factor_; }
    // The mean of channels that do not turn, zeros in the others, and padding.
    const std::vector<float>& constant_mean() const { return constant_mean_; }
    bool has_mean() const { return has_mean_; }
    bool turns() const { return n_pairs_ > 0; } // the mean depends on the block
    int n_pairs() const { return n_pairs_; }
    const std::vector<RopePair>& pairs() const { return conditioning_.rope; }
    // The mean of block 0 in the pairs: [first channels of all pairs, second channels of all pairs].
    const float* pair_mean(int kv_head) const {
        return pair_mean_.data() + static_cast<ptrdiff_t>(kv_head) * 2 * n_pairs_;
    }
    // By how much an entry's block is turned from block 0: [cosines, sines] of all pairs.
    const float* phases(int entry) const { return phases_.data() + static_cast<ptrdiff_t>(entry) * 2 * n_pairs_; }

    // The mean of one head for an entry: head_size floats.
    void head_mean(int kv_head, int entry, float* out) const;

private:
    Conditioning conditioning_;
    uint32_t id_ = 0;
    std::vector<uint8_t> record_;
    int head_size_ = 0;
    bool has_mean_ = false;
    int n_pairs_ = 0;
    std::vector<float> encode_factor_;
    std::vector<float> constant_mean_;
    std::vector<float> pair_mean_;
    std::vector<float> phases_;
};

} // namespace turboquant
