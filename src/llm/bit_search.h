// `tq tune --budget`: bits for each layer's keys and values, from measured divergence.
#pragma once

#include "llm/kv_choice.h"
#include "llm/model.h"
#include "llm/plan.h"

#include <turboquant/profile.h>

#include <atomic>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace turboquant::llm {

struct BitSearchOptions {
    double budget = 0; // mean bits a value
    int threads = 0;
    const std::atomic<bool>* interrupt = nullptr;
    Progress progress;
};

struct BitCandidate {
    std::string name; // "mix", "4/4"
    double bits = 0;
    double kld = 0;
    double predicted = 0;          // the sum of what the sides cost alone, without the floor
    std::vector<LayerBits> layers; // as the profile's
};

// What one side of one layer alone costs.
struct SideDivergence {
    int layer = 0;
    bool value = false; // or its keys
    int bits = 0;
    double kld = 0;
    double error = 0; // standard error
    double floor = 0; // of kld: what the slightest change in this layer costs
};

struct BitSearch {
    std::vector<SideDivergence> sides;
    std::vector<BitCandidate> measured; // of the final comparison, best first
    int64_t positions = 0;              // that it scored
};

// Chooses bits for every layer of the profile, and sets them there. Measures what each side of each layer causes alone
// (divergence from exact rows through the same path, no window), allocates, then compares the outcomes with uniform
// settings of about as many bits and keeps the best. UsageError: a budget outside 2..8. Error: the text has fewer than
// kLeastTuningTokens tokens, or "stopped by Ctrl-C".
BitSearch search_bits(const Model& model, const ModelPlan& plan, std::string_view text, const BitSearchOptions& options,
                      Profile& profile);

} // namespace turboquant::llm
