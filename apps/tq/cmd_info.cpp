// tq info: what a model is and what it needs, without loading it.
#include "commands.h"
#include "options.h"
#include "terminal.h"

#include "llm/error.h"
#include "llm/log.h"
#include "llm/plan.h"
#include "llm/sysinfo.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace turboquant::app {
namespace {

struct InfoFlags {
    ModelFlags model;
    std::string path;
};

struct Row {
    llm::KvChoice kv;
    int64_t kv_bytes = 0;
    int64_t total_bytes = 0;
    int64_t largest = 0;
};

std::string layer_words(const llm::ModelPlan& model, const llm::CachePlan& plan) {
    const auto sliding = std::count_if(plan.layers.begin(), plan.layers.end(), [](const auto& l) { return l.sliding; });
    const auto full = static_cast<int64_t>(plan.layers.size()) - sliding;
    std::string words = fmt::format("{}", model.layers);
    std::vector<std::string> kinds;
    if (full > 0) {
        kinds.push_back(fmt::format("{} attention", full));
    }
    if (sliding > 0) {
        kinds.push_back(fmt::format("{} sliding window of {}", sliding, model.sliding_window));
    }
    if (plan.recurrent_layers > 0) {
        kinds.push_back(fmt::format("{} recurrent", plan.recurrent_layers));
    }
    for (size_t i = 0; i < kinds.size(); ++i) {
        words += (i == 0 ? ": " : ", ") + kinds[i];
    }
    return words;
}

std::string head_words(const llm::ModelPlan& model, const llm::CachePlan& plan) {
    if (plan.layers.empty()) {
        return "none";
    }
    const llm::CacheLayer& layer = plan.layers.front();
    const std::string size = llm::shared_head_size(plan);
    return fmt::format("{} query, {} KV, {}", model.heads, layer.kv_heads,
                       size.empty() ? "sizes differ between layers" : "size " + size);
}

void print_text(const llm::ModelPlan& model, const llm::CachePlan& plan, const std::vector<Row>& rows,
                const llm::FreeMemory& memory) {
    const int64_t f16 = rows.front().kv_bytes;
    fmt::print("model         {}{}\n", model.description, model.name.empty() ? "" : " (" + model.name + ")");
    fmt::print("file          {}\n", model.path);
    fmt::print("architecture  {}, {} parameters\n", model.architecture,
               llm::format_count(static_cast<int64_t>(model.parameters)));
    fmt::print("layers        {}\n", layer_words(model, plan));
    fmt::print("heads         {}\n", head_words(model, plan));
    fmt::print("context       trained for {}; this plan {}\n", llm::format_count(model.trained_context),
               llm::format_count(plan.context));
    fmt::print("chat template {}\n", model.has_chat_template ? "yes" : "no: it continues text");
    fmt::print("memory        weights {}, compute {}{}; free {} ({})\n\n", llm::format_bytes(model.weight_bytes),
               llm::format_bytes(plan.compute_bytes),
               plan.recurrent_bytes > 0 ? ", recurrent state " + llm::format_bytes(plan.recurrent_bytes) : "",
               memory.bytes < 0 ? "unknown" : llm::format_bytes(memory.bytes), memory.source);
    fmt::print("{:<6} {:>5} {:>7} {:>6} {:>11} {:>10} {:>11} {:>16}\n", "cache", "bits", "window", "sinks", "KV",
               "below f16", "all", "largest context");
    for (const Row& row : rows) {
        const bool tq = row.kv.turboquant();
        fmt::print("{:<6} {:>5} {:>7} {:>6} {:>11} {:>10} {:>11} {:>16}\n", row.kv.name, tq ? row.kv.bits() : "-",
                   tq ? std::to_string(row.kv.window) : "-", tq ? std::to_string(row.kv.sinks) : "-",
                   llm::format_bytes(row.kv_bytes),
                   row.kv_bytes > 0
                       ? fmt::format("{:.2f}x", static_cast<double>(f16) / static_cast<double>(row.kv_bytes))
                       : "-",
                   llm::format_bytes(row.total_bytes),
                   memory.bytes < 0   ? "?"
                   : row.largest == 0 ? "does not fit"
                                      : llm::format_count(row.largest));
    }
    fmt::print("\nThe largest context is what fits into free memory. ");
    fmt::print("Beyond {} tokens the model was not trained.\n", llm::format_count(model.trained_context));
}

nlohmann::json as_json(const llm::ModelPlan& model, const llm::CachePlan& plan, const std::vector<Row>& rows,
                       const llm::FreeMemory& memory) {
    nlohmann::json layers = nlohmann::json::array();
    for (const llm::CacheLayer& layer : plan.layers) {
        layers.push_back({{"layer", layer.index},
                          {"sliding", layer.sliding},
                          {"cells", layer.cells},
                          {"kv_heads", layer.kv_heads},
                          {"key_size", layer.key_size},
                          {"value_size", layer.value_size}});
    }
    nlohmann::json caches = nlohmann::json::array();
    for (const Row& row : rows) {
        nlohmann::json cache = {{"kv", row.kv.name},
                                {"kv_bytes", row.kv_bytes},
                                {"total_bytes", row.total_bytes},
                                {"largest_context", row.largest}};
        if (row.kv.turboquant()) {
            if (row.kv.automatic) {
                cache["bits"] = row.kv.mean_bits;
            } else {
                cache["key_bits"] = row.kv.key_bits;
                cache["value_bits"] = row.kv.value_bits;
            }
            cache["window"] = row.kv.window;
            cache["sinks"] = row.kv.sinks;
        }
        caches.push_back(cache);
    }
    return {{"path", model.path},
            {"name", model.name},
            {"description", model.description},
            {"architecture", model.architecture},
            {"parameters", model.parameters},
            {"layers", model.layers},
            {"recurrent_layers", plan.recurrent_layers},
            {"cache_layers", layers},
            {"heads", model.heads},
            {"sliding_window", model.sliding_window},
            {"trained_context", model.trained_context},
            {"context", plan.context},
            {"chat_template", model.has_chat_template},
            {"weight_bytes", model.weight_bytes},
            {"compute_bytes", plan.compute_bytes},
            {"recurrent_bytes", plan.recurrent_bytes},
            {"free_bytes", memory.bytes},
            {"caches", caches}};
}

int info(const InfoFlags& flags) {
    check_flags(flags.model);
    if (!flags.path.empty() && !flags.model.model.empty()) {
        throw llm::UsageError("info: two models given; name one");
    }
    std::vector<std::string> names = llm::kv_overview();
    std::vector<llm::KvChoice> choices;
    choices.reserve(names.size() + 1);
    for (const std::string& name : names) {
        choices.push_back(llm::parse_kv(name));
    }
    // A cache that the flags describe gets a row of its own.
    const llm::KvChoice own = choose_kv(flags.model);
    if (std::none_of(choices.begin(), choices.end(),
                     [&](const llm::KvChoice& choice) { return choice.describe() == own.describe(); })) {
        choices.push_back(own);
    }
    llm::install_log(flags.model.verbose);
    const llm::ModelPlan model(llm::resolve_model_path(flags.path.empty() ? flags.model.model : flags.path));
    const llm::CachePlan plan = model.plan(llm::choose_context(model, flags.model.context));
    for (llm::KvChoice& choice : choices) {
        if (choice.automatic) { // its bits are the profile's
            llm::find_profile(model.path, choose_profile(flags.model.profile), plan, choice, {});
        }
    }
    const llm::FreeMemory memory = llm::free_memory();
    std::vector<Row> rows;
    rows.reserve(choices.size());
    for (const llm::KvChoice& choice : choices) {
        rows.push_back({choice, llm::kv_bytes(plan, choice), model.total_bytes(plan, choice),
                        memory.bytes < 0 ? 0 : model.largest_context(choice, memory.bytes)});
    }
    if (flags.model.json) {
        fmt::print("{}\n", as_json(model, plan, rows, memory).dump(2));
    } else {
        print_text(model, plan, rows, memory);
    }
    return 0;
}

} // namespace

Command add_info(CLI::App& program) {
    auto flags = std::make_shared<InfoFlags>();
    CLI::App* command =
        program.add_subcommand("info", "what a model is and needs: memory of each cache, longest context");
    command->add_option("MODEL", flags->path, "GGUF file (default: as in run)")->type_name("");
    add_model_flags(*command, flags->model);
    return [flags] { return info(*flags); };
}

} // namespace turboquant::app
