// Where the conditioning of one layer's keys comes from: a profile, the first rows of the running cache, rows that were
// saved with it, or nowhere. Once settled it stays for the life of the cache; only its RoPE pairs follow the graph.
#pragma once

#include "tuner.h"

#include "turboquant/parallel.h"
#include "turboquant/profile.h"
#include "turboquant/status.h"
#include "turboquant/store.h"

#include <memory>
#include <optional>
#include <vector>

namespace turboquant::plugin {

using Stores = std::vector<std::unique_ptr<Store>>; // one a stream, all with the same conditioning

// Not thread-safe.
class KeySource {
public:
    static constexpr int kCalibrationRows = 128; // counted keys (docs/quality.md)
    static constexpr int kRing = 192;            // rows kept exact until then: some do not count
    enum class State {
        none,     // nothing conditions these keys
        profile,  // the profile does
        waiting,  // the first rows are being collected
        rows,     // they have been
        restored, // saved rows brought theirs
        unknown   // nothing does, as the graph does not say how the keys turn
    };

    KeySource() = default;
    // profile: the layer's, copied, or null. calibrate: collect when there is none.
    KeySource(const LayerProfile* profile, bool calibrate);

    State state() const { return state_; }
    bool calibrates() const { return calibrates_; } // began as `waiting`
    // What the stores are to be created with.
    int calibration_rows() const { return state_ == State::waiting ? kRing : 0; }
    const Conditioning& initial() const { return conditioning_; }

    // What the graph says, before its first rows are written and whenever it changes.
    Status see_turns(const RopeFacts& facts, Stores& stores, const ParallelFor& parallel);
    // Whether rows are to be added.
    bool wants_rows() const { return statistics_.has_value(); }
    // In order of writing; rows that nearly repeat earlier ones do not count. Waiting: until complete(). Profile: checks
    // the first rows against it.
    void add(const SeenRow& row, int head_size, int kv_heads);
    bool complete() const { return state_ == State::waiting && n_counted_ >= kCalibrationRows; }
    // Conditions all stores with what the rows say. staging: of each store's current batch, or null.
    Status finish(Stores& stores, const std::vector<const Staging*>& staging, const ParallelFor& parallel);
    // While waiting: takes over what saved rows were made with.
    Status adopt(const Conditioning& conditioning, Stores& stores);

    // Of a profile, once enough rows were seen: whether it leaves more of the keys than there was.
    bool checked() const { return checked_; }
    bool doubtful() const { return doubtful_; }
    double residual() const { return residual_; }

private:
    Status condition(Stores& stores, const std::vector<const Staging*>& staging, const ParallelFor& parallel);

    State state_ = State::none;
    bool calibrates_ = false;
    Conditioning conditioning_;
    bool repeats(const SeenRow& row, int head_size, int kv_heads);

    std::optional<KeyStatistics> statistics_;
    double query_energy_ = 0; // sum over the rows seen: of a query channel, scaled
    int n_seen_ = 0;
    int n_counted_ = 0;
    bool checked_ = false;
    bool doubtful_ = false;
    double residual_ = 1;
};

} // namespace turboquant::plugin
