#include "tuner.h"

#include "turboquant/profile.h"

#include <atomic>
#include <cmath>
#include <exception>
#include <map>
#include <mutex>

namespace turboquant::plugin {
namespace {

struct Layer {
    int head_size;
    int kv_heads;
    RopeTrace::Kind kind;
    KeyStatistics statistics;
    bool changed_shape = false; // two models were run
};

std::mutex g_mutex;
std::map<int, Layer> g_layers;
std::atomic<bool> g_tuning{false};

thread_local std::string t_message;
const char* answer(const Status& status) {
    if (status.ok()) {
        return nullptr;
    }
    t_message = status.message();
    return t_message.c_str();
}

Status make_profile(const char* model, const char* text, Profile& profile) {
    if (g_layers.empty()) {
        return invalid("tuning: no keys were seen; run a text through a context whose cache is on the device TQ0");
    }
    profile.model = model == nullptr ? "" : model;
    profile.text = text == nullptr ? "" : text;
    for (const auto& [number, layer] : g_layers) {
        const std::string name = "tuning: layer " + std::to_string(number);
        if (layer.changed_shape) {
            return invalid(name + " had two shapes; tune one model at a time");
        }
        if (layer.kind == RopeTrace::Kind::unknown) {
            return invalid(name + ": the graph does not show how its keys turn; tune with all weights on the CPU");
        }
        if (layer.statistics.keys() == 0) {
            return invalid(name + " saw no key after the first " + std::to_string(kFirstPosition) +
                           " positions; use a longer text");
        }
        profile.layers.push_back({.layer = number,
                                  .head_size = layer.head_size,
                                  .kv_heads = layer.kv_heads,
                                  .keys = storable(layer.statistics.conditioning())});
    }
    return {};
}

} // namespace

bool SeenRow::finite(int head_size, int kv_heads) const {
    constexpr float kLargestHalf = 65504.0F;
    auto fine = [](const float* x, int n) {
        int bad = 0;
        for (int i = 0; i < n; ++i) {
            bad |= !(std::fabs(x[i]) <= kLargestHalf); // true for NaN
        }
        return bad == 0;
    };
    bool ok = fine(key, head_size * kv_heads);
    for (int head = 0; head < n_heads && ok; ++head) {
        ok = fine(q + head * q_head_stride, head_size);
    }
    return ok;
}

void add_row(const SeenRow& row, int head_size, int kv_heads, KeyStatistics& statistics) {
    if (row.position < kFirstPosition || !row.finite(head_size, kv_heads)) {
        return;
    }
    statistics.add_key(row.key, row.position);
    const int group = row.n_heads / kv_heads;
    for (int head = 0; head < row.n_heads; ++head) {
        statistics.add_query(row.q + head * row.q_head_stride, head / group);
    }
}

bool tuning() {
    return g_tuning.load(std::memory_order_relaxed);
}

void tune_row(int layer, int head_size, int kv_heads, const RopeFacts& facts, const SeenRow& row) {
    const std::lock_guard lock(g_mutex);
    if (!g_tuning) {
        return;
    }
    auto found = g_layers.find(layer);
    if (found == g_layers.end()) {
        found =
            g_layers
                .emplace(layer, Layer{head_size, kv_heads, facts.kind, KeyStatistics(head_size, kv_heads, facts.pairs)})
                .first;
    }
    Layer& known = found->second;
    if (known.head_size != head_size || known.kv_heads != kv_heads) {
        known.changed_shape = true;
        return;
    }
    add_row(row, head_size, kv_heads, known.statistics);
}

const char* turboquant_tune_start() {
    const std::lock_guard lock(g_mutex);
    g_layers.clear();
    g_tuning = true;
    return nullptr;
}

const char* turboquant_tune_write(const char* path, const char* model, const char* text) {
    const std::lock_guard lock(g_mutex);
    try {
        if (!g_tuning) {
            return answer(invalid("tuning was not started: call turboquant_tune_start first"));
        }
        g_tuning = false;
        Profile profile;
        Status status = path == nullptr ? invalid("tuning: no path to write to") : make_profile(model, text, profile);
        g_layers.clear();
        return answer(status.ok() ? write_profile(path, profile) : status);
    } catch (const std::exception& error) {
        g_tuning = false;
        g_layers.clear();
        return answer({StatusCode::internal, std::string("tuning: ") + error.what()});
    }
}

} // namespace turboquant::plugin
