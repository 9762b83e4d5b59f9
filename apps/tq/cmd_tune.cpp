// tq tune: measures a model's keys and writes its profile.
#include "commands.h"
#include "options.h"
#include "terminal.h"

#include "llm/bit_search.h"
#include "llm/error.h"
#include "llm/log.h"
#include "llm/tuning.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <optional>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace turboquant::app {
namespace {

struct TuneFlags {
    std::string model;
    std::string file;
    std::string output;
    int64_t tokens = llm::kTuningTokens;
    std::optional<double> budget;
    ModelFlags common; // threads, json, verbose
};

std::string read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::error_code ignored;
    if (!file || std::filesystem::is_directory(path, ignored)) {
        throw llm::Error(fmt::format("{}: cannot be read{}; check the path of --file", path,
                                     file ? "" : fmt::format(": {}", std::strerror(errno))));
    }
    return std::string(std::istreambuf_iterator<char>(file), {});
}

void print_search(const llm::BitSearch& search, const Profile& profile) {
    fmt::print("\n{:<18} {:>12} {:>12}\n", "cache", "bits a value", "KLD (nats)");
    for (const llm::BitCandidate& candidate : search.measured) {
        fmt::print("{:<18} {:>12.3f} {:>12.6f}{}\n", candidate.name, candidate.bits, candidate.kld,
                   &candidate == &search.measured.front() ? "  chosen" : "");
    }
    fmt::print("\n{:<18} {:>12} {:>12}\n", "layer", "key bits", "value bits");
    for (const LayerProfile& layer : profile.layers) {
        fmt::print("{:<18} {:>12} {:>12}\n", layer.layer, layer.key_bits,
                   layer.value_bits == 0 ? "-" : std::to_string(layer.value_bits));
    }
    fmt::print("\nWith --kv auto the cache has these bits. KLD over {} positions, no window.\n", search.positions);
}

nlohmann::json as_json(const std::string& path, const llm::Tuned& tuned, const std::optional<llm::BitSearch>& search) {
    nlohmann::json layers = nlohmann::json::array();
    for (const LayerProfile& layer : tuned.profile.layers) {
        nlohmann::json row = {{"layer", layer.layer}, {"head_size", layer.head_size}, {"kv_heads", layer.kv_heads}};
        if (search) {
            row["key_bits"] = layer.key_bits;
            row["value_bits"] = layer.value_bits;
        }
        layers.push_back(row);
    }
    nlohmann::json root = {{"profile", path},        {"model", tuned.profile.model}, {"text", tuned.profile.text},
                           {"tokens", tuned.tokens}, {"seconds", tuned.seconds},     {"layers", layers}};
    if (search) {
        root["bits"] = tuned.profile.bits;
        root["positions"] = search->positions;
        for (const llm::BitCandidate& candidate : search->measured) {
            root["measured"].push_back({{"kv", candidate.name},
                                        {"bits", candidate.bits},
                                        {"kld_mean", candidate.kld},
                                        {"kld_predicted", candidate.predicted}});
        }
        for (const llm::SideDivergence& side : search->sides) {
            root["sides"].push_back({{"layer", side.layer},
                                     {"side", side.value ? "values" : "keys"},
                                     {"bits", side.bits},
                                     {"kld_mean", side.kld},
                                     {"kld_se", side.error},
                                     {"floor", side.floor}});
        }
    }
    return root;
}

void check_flags(const TuneFlags& flags) {
    check_flags(flags.common);
    check_range("--tokens", flags.tokens, llm::kLeastTuningTokens, int64_t{1} << 24);
    if (flags.budget && !(*flags.budget >= 2 && *flags.budget <= 8)) { // before anything that takes time
        throw llm::UsageError(fmt::format("--budget {}: use a number of bits from 2 to 8", *flags.budget));
    }
}

int tune(const TuneFlags& flags) {
    check_flags(flags);
    const std::string path = llm::resolve_model_path(flags.model);
    const std::string name = std::filesystem::path(path).filename().string();
    const std::string text = flags.file.empty() ? std::string(llm::calibration_text()) : read_file(flags.file);
    llm::install_log(flags.common.verbose);
    catch_interrupts();
    const llm::ModelPlan plan(path);
    // Where it will go is known to be writable before minutes have passed.
    const std::string target = flags.output.empty() ? llm::cached_profile_path(path).string() : flags.output;
    {
        const llm::CachePlan cache = plan.plan(std::min<int64_t>(plan.trained_context, flags.tokens));
        llm::check_fit(plan, cache, llm::parse_kv("16/16"));
        if (const Status status = write_profile(target + ".try", Profile{}); !status.ok()) {
            throw llm::Error(fmt::format("{}: cannot be written; name another place with --output", target));
        }
        std::filesystem::remove(target + ".try");
    }
    const llm::Model model = llm::Model::load(path, true, progress("loading " + name));
    llm::TuneOptions options;
    options.text_name = flags.file.empty() ? llm::kBuiltInText : flags.file;
    options.tokens = flags.tokens;
    options.threads = flags.common.threads;
    options.interrupt = &interrupt_flag();
    options.progress = progress("measuring the keys of " + name);
    llm::Tuned tuned = llm::tune(model, plan, text, options);
    std::optional<llm::BitSearch> search;
    if (flags.budget) {
        llm::BitSearchOptions searching;
        searching.budget = *flags.budget;
        searching.threads = flags.common.threads;
        searching.interrupt = &interrupt_flag();
        searching.progress = progress("choosing bits");
        search = llm::search_bits(model, plan, text, searching, tuned.profile);
    }
    if (const Status status = write_profile(target, tuned.profile); !status.ok()) {
        throw llm::Error(status.message());
    }
    if (flags.common.json) {
        fmt::print("{}\n", as_json(target, tuned, search).dump(2));
        return 0;
    }
    fmt::print("{}: {} layers, {} tokens of {} in {:.1f} s\n{}\n", name, tuned.profile.layers.size(),
               llm::format_count(tuned.tokens), options.text_name, tuned.seconds, target);
    if (search) {
        print_search(*search, tuned.profile);
    }
    return 0;
}

} // namespace

Command add_tune(CLI::App& program) {
    auto flags = std::make_shared<TuneFlags>();
    CLI::App* command = program.add_subcommand("tune", "measure a model's keys, for better caches: writes its profile");
    command
        ->add_option("model,-m,--model", flags->model,
                     "GGUF file (default: TURBOQUANT_MODEL, else the one set-up installed)")
        ->type_name("MODEL");
    command->add_option("--file", flags->file, "a text of your own (default: a built-in one, prose and source code)")
        ->type_name("FILE");
    command
        ->add_option("--tokens", flags->tokens, fmt::format("of the text, spread over it (default {})", flags->tokens))
        ->type_name("N");
    command
        ->add_option(
            "--budget", flags->budget,
            "choose bits for each layer's keys and values: the least divergence within that many bits a value, "
            "2 to 8; takes minutes; for --kv auto")
        ->type_name("BITS");
    command
        ->add_option("--output", flags->output,
                     "the profile's path (default: in the cache folder, where run, chat and eval find it)")
        ->type_name("FILE");
    command->add_option("-t,--threads", flags->common.threads, "threads (default: physical cores)")->type_name("N");
    add_output_flags(*command, flags->common);
    return [flags] { return tune(*flags); };
}

} // namespace turboquant::app
