#include "llm/sampling.h"

#include <cmath>
#include <cstdlib>
#include <random>

namespace turboquant::llm {
namespace {

// A metadata value that is a usable number of the given range, else `otherwise`.
double from_metadata(const Model& model, llama_model_meta_key key, double low, double high, double otherwise) {
    const char* name = llama_model_meta_key_str(key);
    const std::string text = name == nullptr ? std::string() : model.metadata(name);
    char* end = nullptr;
    const double value = std::strtod(text.c_str(), &end);
    return !text.empty() && *end == '\0' && value >= low && value <= high ? value : otherwise;
}

} // namespace

SamplingOptions resolve_sampling(const SamplingFlags& flags, const Model& model) {
    SamplingOptions options;
    options.temp = flags.temp.value_or(from_metadata(model, LLAMA_MODEL_META_KEY_SAMPLING_TEMP, 0, 100, options.temp));
    options.top_k = flags.top_k.value_or(
        static_cast<int>(from_metadata(model, LLAMA_MODEL_META_KEY_SAMPLING_TOP_K, 0, 1e6, options.top_k)));
    options.top_p =
        flags.top_p.value_or(from_metadata(model, LLAMA_MODEL_META_KEY_SAMPLING_TOP_P, 0, 1, options.top_p));
    options.min_p =
        flags.min_p.value_or(from_metadata(model, LLAMA_MODEL_META_KEY_SAMPLING_MIN_P, 0, 1, options.min_p));
    options.seed = flags.seed ? *flags.seed : std::random_device{}();
    return options;
}

Sampler make_sampler(const SamplingOptions& options, int vocabulary) {
    Sampler chain(llama_sampler_chain_init(llama_sampler_chain_default_params()));
    const auto add = [&](llama_sampler* stage) { llama_sampler_chain_add(chain.get(), stage); };
    if (!options.bias.empty()) {
        add(llama_sampler_init_logit_bias(vocabulary, static_cast<int32_t>(options.bias.size()), options.bias.data()));
    }
    if (options.penalties()) {
        add(llama_sampler_init_penalties(vocabulary, options.penalty_last, static_cast<float>(options.repeat_penalty),
                                         static_cast<float>(options.frequency_penalty),
                                         static_cast<float>(options.presence_penalty)));
    }
    if (options.temp <= 0) {
        add(llama_sampler_init_greedy());
        return chain;
    }
    if (options.top_k > 0) {
        add(llama_sampler_init_top_k(options.top_k));
    }
    add(llama_sampler_init_top_p(static_cast<float>(options.top_p), 1));
    add(llama_sampler_init_min_p(static_cast<float>(options.min_p), 1));
    add(llama_sampler_init_temp(static_cast<float>(options.temp)));
    add(llama_sampler_init_dist(options.seed));
    return chain;
}

} // namespace turboquant::llm
