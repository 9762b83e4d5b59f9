// The flags that commands share, and checking what they say.
#pragma once

#include "llm/kv_choice.h"
#include "llm/profile_cache.h"
#include "llm/sampling.h"

#include <cstdint>
#include <optional>
#include <string>

#include <CLI/CLI.hpp>

namespace turboquant::app {

struct ModelFlags {
    std::string model;
    llm::KvFlags kv;
    llm::ProfileFlags profile;
    std::optional<int64_t> context; // 0: all that the model was trained for
    int threads = 0;
    bool json = false;
    bool verbose = false;
};

struct AnswerFlags {
    llm::SamplingFlags sampling;
    int64_t limit = 1024;              // -1: none
    std::optional<std::string> system; // absent: what the model's template says; empty: none
};

void add_model_flags(CLI::App& command, ModelFlags& flags);
void add_answer_flags(CLI::App& command, AnswerFlags& flags);
// --temp, --top-k, --top-p and --min-p.
void add_sampling_flags(CLI::App& command, llm::SamplingFlags& flags);

// --profile and --no-profile.
void add_profile_flags(CLI::App& command, llm::ProfileFlags& flags);
// With TURBOQUANT_PROFILE where the flags say nothing. UsageError: both were given.
llm::ProfileFlags choose_profile(const llm::ProfileFlags& flags);

// --verbose and --json only.
void add_output_flags(CLI::App& command, ModelFlags& flags);

// The cache that the flags name; where they say nothing, TURBOQUANT_KV, _WINDOW and _SINKS count, as in any host of the
// plug-in. Throws UsageError.
llm::KvChoice choose_kv(const ModelFlags& flags);

// Throws UsageError naming flag, value and what is accepted.
void check_range(const char* flag, int64_t value, int64_t least, int64_t most);
void check_flags(const ModelFlags& flags);
void check_flags(const AnswerFlags& flags);
void check_flags(const llm::SamplingFlags& sampling);

// "temp" and "0.7" into flags, as --temp 0.7 does; for /set. Throws UsageError.
void set_answer_flag(AnswerFlags& flags, const std::string& name, const std::string& value);

// An environment variable's value, absent when unset or empty.
std::optional<std::string> environment(const char* name);

} // namespace turboquant::app
