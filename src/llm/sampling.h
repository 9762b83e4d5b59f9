// How the next token is chosen from the model's scores.
#pragma once

#include "llm/model.h"

#include <cstdint>
#include <memory>
#include <optional>

namespace turboquant::llm {

struct SamplingOptions {
    double temp = 0.8; // 0: always the likeliest token
    int top_k = 40;    // 0: off
    double top_p = 0.95;
    double min_p = 0.05;
    uint32_t seed = 0;
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
Sampler make_sampler(const SamplingOptions& options);

} // namespace turboquant::llm
