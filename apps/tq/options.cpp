#include "options.h"

#include "llm/error.h"

#include <charconv>
#include <cmath>
#include <cstdlib>

#include <fmt/format.h>

namespace turboquant::app {
namespace {

using llm::UsageError;

constexpr int64_t kMaxContext = int64_t{1} << 31;

void check_range(const char* flag, double value, double low, double high, const char* accepted) {
    if (!(value >= low && value <= high)) { // written so that NaN fails
        throw UsageError(fmt::format("{} {}: use {}", flag, value, accepted));
    }
}

template <class Number>
Number parse_number(const std::string& name, const std::string& text) {
    Number value{};
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (text.empty() || error != std::errc() || end != text.data() + text.size()) {
        throw UsageError(fmt::format("{} '{}': not a number that fits; give one such as {}", name, text,
                                     std::is_integral_v<Number> ? "40" : "0.7"));
    }
    return value;
}

} // namespace

std::optional<std::string> environment(const char* name) {
    const char* value = std::getenv(name);
    return value == nullptr || *value == '\0' ? std::nullopt : std::optional<std::string>(value);
}

void add_output_flags(CLI::App& command, ModelFlags& flags) {
    command.add_flag("--json", flags.json, "print JSON instead of text");
    command.add_flag("--verbose", flags.verbose, "show libllama's log");
}

void add_profile_flags(CLI::App& command, llm::ProfileFlags& flags) {
    command
        .add_option(
            "--profile", flags.path,
            "what keys are conditioned with, from tq tune (default: TURBOQUANT_PROFILE, else the model's in the "
            "cache folder, made at its first load)")
        ->type_name("FILE");
    command.add_flag("--no-profile", flags.off, "no profile: the cache calibrates itself on its first 128 positions");
}

llm::ProfileFlags choose_profile(const llm::ProfileFlags& flags) {
    if (flags.off && !flags.path.empty()) {
        throw UsageError("--profile and --no-profile: contradict each other; leave one of them out");
    }
    llm::ProfileFlags chosen = flags;
    if (!flags.off && flags.path.empty()) {
        chosen.path = environment("TURBOQUANT_PROFILE").value_or("");
    }
    return chosen;
}

void add_model_flags(CLI::App& command, ModelFlags& flags) {
    command
        .add_option("-m,--model", flags.model, "GGUF file (default: TURBOQUANT_MODEL, else the one set-up installed)")
        ->type_name("FILE");
    command
        .add_option(
            "--kv", flags.kv.kv,
            "KV cache: tq6 (keys 6, values 5 bits) tq5 (5/4) tq4 (4/4) tq3 (3/3), or 6 5 4 3; bits K/V such as 8/4; "
            "auto "
            "(each layer's from the profile); f16 q8_0 q5_1 q5_0 q4_0 (default tq4). At head size 128 a value takes "
            "5.63, 4.63, 4.13 and 3.13 bits, scales included, f16's 16; tq info has the bytes of a model. tq3 "
            "loses details far back")
        ->type_name("CACHE");
    command.add_option("--key-bits", flags.kv.key_bits, "bits of keys: 2 3 4 5 6 8")->type_name("N");
    command.add_option("--value-bits", flags.kv.value_bits, "bits of values: 2 3 4 5 6 8")->type_name("N");
    command.add_option("--window", flags.kv.window, "latest positions kept exact (default 32, tq3 128)")
        ->type_name("N");
    command.add_option("--sinks", flags.kv.sinks, "first positions kept exact (default 4)")->type_name("N");
    add_profile_flags(command, flags.profile);
    command.add_flag("--no-turboquant", flags.kv.no_turboquant, "llama.cpp's own f16 cache (as --kv f16)");
    command
        .add_option("-c,--ctx", flags.context,
                    "context in tokens; 0: all the model was trained for "
                    "(default: that, at most 8192)")
        ->type_name("N");
    command.add_option("-t,--threads", flags.threads, "threads (default: physical cores)")->type_name("N");
    add_output_flags(command, flags);
}

void add_sampling_flags(CLI::App& command, llm::SamplingFlags& flags) {
    command.add_option("--temp", flags.temp, "temperature; 0: always the likeliest token")->type_name("X");
    command.add_option("--top-k", flags.top_k, "choose among the K likeliest; 0: off")->type_name("K");
    command.add_option("--top-p", flags.top_p, "choose among the likeliest that sum to P")->type_name("P");
    command.add_option("--min-p", flags.min_p, "drop tokens below P times the likeliest")->type_name("P");
}

void add_answer_flags(CLI::App& command, AnswerFlags& flags) {
    command.add_option("-n", flags.limit, "most tokens of an answer; -1: until the context is full (default 1024)")
        ->type_name("N");
    command.add_option("--seed", flags.sampling.seed, "seed of the choice of tokens (default: random)")->type_name("N");
    add_sampling_flags(command, flags.sampling);
    command.add_option("--system", flags.system, "system message; '': none (default: the model's own)")
        ->type_name("TEXT");
}

llm::KvChoice choose_kv(const ModelFlags& flags) {
    llm::KvFlags kv = flags.kv;
    if (!kv.no_turboquant && !kv.kv) {
        kv.kv = environment("TURBOQUANT_KV");
    }
    if (!kv.no_turboquant && llm::parse_kv(kv.kv.value_or("default")).turboquant()) {
        const auto rows = [](const char* name, std::optional<int>& value) {
            const auto text = environment(name);
            if (!value && text) {
                value = parse_number<int>(name, *text);
            }
        };
        rows("TURBOQUANT_WINDOW", kv.window);
        rows("TURBOQUANT_SINKS", kv.sinks);
    }
    return llm::resolve_kv(kv);
}

void check_range(const char* flag, int64_t value, int64_t least, int64_t most) {
    if (value < least || value > most) {
        throw UsageError(fmt::format("{} {}: use a number from {} to {}", flag, value, least, most));
    }
}

void check_flags(const ModelFlags& flags) {
    if (flags.context) {
        check_range("--ctx", static_cast<double>(*flags.context), 0, static_cast<double>(kMaxContext),
                    "a number of tokens from 0 (all the model was trained for) to 2147483648");
    }
    check_range("--threads", flags.threads, 0, 512, "a number from 1 to 512");
}

void check_flags(const AnswerFlags& flags) {
    check_range("-n", static_cast<double>(flags.limit), -1, 1e9, "a number of tokens, or -1 for no limit");
    check_flags(flags.sampling);
}

void check_flags(const llm::SamplingFlags& sampling) {
    check_range("--temp", sampling.temp.value_or(0), 0, 100, "a number from 0 to 100");
    check_range("--top-k", sampling.top_k.value_or(0), 0, 1e9, "0 or more");
    check_range("--top-p", sampling.top_p.value_or(1), 0, 1, "a number from 0 to 1");
    check_range("--min-p", sampling.min_p.value_or(0), 0, 1, "a number from 0 to 1");
}

void set_answer_flag(AnswerFlags& flags, const std::string& name, const std::string& value) {
    AnswerFlags changed = flags;
    if (name == "temp") {
        changed.sampling.temp = parse_number<double>(name, value);
    } else if (name == "top-k") {
        changed.sampling.top_k = parse_number<int>(name, value);
    } else if (name == "top-p") {
        changed.sampling.top_p = parse_number<double>(name, value);
    } else if (name == "min-p") {
        changed.sampling.min_p = parse_number<double>(name, value);
    } else if (name == "seed") {
        changed.sampling.seed = parse_number<uint32_t>(name, value);
    } else if (name == "n") {
        changed.limit = parse_number<int64_t>(name, value);
    } else {
        throw UsageError(fmt::format("/set {}: unknown; use temp, top-k, top-p, min-p, seed or n", name));
    }
    check_flags(changed);
    flags = changed;
}

} // namespace turboquant::app
