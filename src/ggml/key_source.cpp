#include "key_source.h"

#include <utility>

namespace turboquant::plugin {
namespace {

constexpr int kRepeats = 3; // a row like that many before it says nothing new
// Residual of a profile: its own model's layers .3 to .6 on prose and source code (SmolLM2), .6 to 1.0 (Gemma 3); those
// of another layer or with other channels 1.0 to 5, most of them above this.
constexpr double kDoubtful = 1.05;
constexpr double kSameScore = .1; // variance of the score's difference below which two keys are alike
constexpr int kCheckedRows = 64;  // of a profile's first keys

} // namespace

KeySource::KeySource(const LayerProfile* profile, bool calibrate) {
    if (profile != nullptr) {
        state_ = State::profile;
        conditioning_ = profile->keys;
    } else if (calibrate) {
        state_ = State::waiting;
        calibrates_ = true;
    }
}

Status KeySource::condition(Stores& stores, const std::vector<const Staging*>& staging, const ParallelFor& parallel) {
    for (size_t stream = 0; stream < stores.size(); ++stream) {
        const Staging* staged = stream < staging.size() ? staging[stream] : nullptr;
        if (Status status = stores[stream]->condition(conditioning_, staged, parallel); !status.ok()) {
            return status;
        }
    }
    return {};
}

Status KeySource::see_turns(const RopeFacts& facts, Stores& stores, const ParallelFor& parallel) {
    const bool known = facts.kind != RopeTrace::Kind::unknown;
    const int head_size = stores[0]->shape().head_size;
    const int kv_heads = stores[0]->shape().kv_heads;
    if (state_ == State::waiting) {
        if (known) {
            statistics_.emplace(head_size, kv_heads, facts.pairs);
            n_counted_ = 0;
            return {};
        }
        state_ = State::unknown; // conditioning_ is empty: the ring shrinks
        return condition(stores, {}, parallel);
    }
    Status status;
    if (known && !conditioning_.mu.empty() && !same_turns(conditioning_.rope, facts.pairs)) {
        conditioning_.rope = facts.pairs;
        status = condition(stores, {}, parallel);
    }
    if (state_ == State::profile && !checked_ && known) {
        statistics_.emplace(head_size, kv_heads, conditioning_.rope);
    }
    return status;
}

// Two keys are alike when queries hardly tell them apart: by scores, as a share of the keys' energy is no measure where
// a bias dwarfs what the tokens say. SmolLM2, Gemma 3: prose 1 to 40, one token again and again .00 to .1 in all layers
// but two.
bool KeySource::repeats(const SeenRow& row, int head_size, int kv_heads) {
    double energy = 0;
    for (int head = 0; head < row.n_heads; ++head) {
        constexpr int kLanes = 16; // head sizes are multiples of 4; the rest goes to the first
        float lanes[kLanes] = {};
        const float* const q = row.q + head * row.q_head_stride;
        int c = 0;
        for (; c + kLanes <= head_size; c += kLanes) {
            for (int l = 0; l < kLanes; ++l) {
                const float x = row.scale * q[c + l];
                lanes[l] += x * x;
            }
        }
        for (; c < head_size; ++c) {
            lanes[0] += row.scale * q[c] * (row.scale * q[c]);
        }
        for (const float lane : lanes) {
            energy += static_cast<double>(lane);
        }
    }
    query_energy_ += energy / row.n_heads / head_size;
    ++n_seen_;
    // A random query's score differs by (energy of its channels) * (squared distance of the heads' keys).
    const double distance = query_energy_ > 0 ? kSameScore * kv_heads / (query_energy_ / n_seen_) : 0;
    return statistics_->repeats(row.key, row.position, kRepeats, distance);
}

void KeySource::add(const SeenRow& row, int head_size, int kv_heads) {
    if (!statistics_ || row.position < kFirstPosition || complete()) {
        return;
    }
    const int64_t before = statistics_->keys();
    if (row.finite(head_size, kv_heads) && repeats(row, head_size, kv_heads)) {
        return;
    }
    add_row(row, head_size, kv_heads, *statistics_);
    n_counted_ += static_cast<int>(statistics_->keys() - before);
    if (state_ == State::profile && n_counted_ >= kCheckedRows) {
        residual_ = statistics_->residual(conditioning_);
        checked_ = true;
        doubtful_ = residual_ > kDoubtful;
        statistics_.reset();
    }
}

Status KeySource::finish(Stores& stores, const std::vector<const Staging*>& staging, const ParallelFor& parallel) {
    conditioning_ = storable(statistics_->conditioning());
    state_ = State::rows;
    statistics_.reset();
    return condition(stores, staging, parallel);
}

Status KeySource::adopt(const Conditioning& conditioning, Stores& stores) {
    conditioning_ = conditioning;
    state_ = State::restored;
    statistics_.reset();
    return condition(stores, {}, ParallelFor{});
}

} // namespace turboquant::plugin
