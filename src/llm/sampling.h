// How the next token is chosen from the model's scores.
#pragma once

#include "llm/model.h"

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

namespace turboquant::llm {

struct SamplingOptions {
    double temp = 0.8; // 0: always the likeliest token
    int top_k = 40;    // 0: off
    double top_p = 0.95;
    double min_p = 0.05;
    uint32_t seed = 0;
    // On scores, before all of the above. The penalties count among the latest `penalty_last` tokens that the sampler
    // has accepted.
    double repeat_penalty = 1; // > 0; 1: off
    double presence_penalty = 0;
    double frequency_penalty = 0;
    int penalty_last = 64; // 0: no penalties
    std::vector<llama_logit_bias> bias;

    bool penalties() const {
        return penalty_last > 0 && (repeat_penalty != 1 || presence_penalty != 0 || frequency_penalty != 0);
    }
    // The choice is the largest of the model's own scores.
    bool plain_greedy() const { return temp <= 0 && !penalties() && bias.empty(); }
};

// What the user said; the rest comes from the model's metadata (general.sampling.*), else from the defaults above.
struct SamplingFlags {
    std::optional<double> temp;
    std::optional<int> top_k;
    std::optional<double> top_p;
    std::optional<double> min_p;
    std::optional<uint32_t> seed; // absent: random
};
SamplingOptions resolve_sampling(const SamplingFlags& flags, const Model& model);

struct SamplerDeleter {
    void operator()(llama_sampler* sampler) const { llama_sampler_free(sampler); }
};
using Sampler = std::unique_ptr<llama_sampler, SamplerDeleter>;
// vocabulary: tokens of the model; only bias and penalties need it.
Sampler make_sampler(const SamplingOptions& options, int vocabulary = 0);

} // namespace turboquant::llm
