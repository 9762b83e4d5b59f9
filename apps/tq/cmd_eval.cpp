// tq eval: what a cache setting costs, on the user's own model and text.
#include "eval.h"
#include "options.h"
#include "terminal.h"

#include "llm/error.h"
#include "llm/helper_script.h"

#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#include <fmt/format.h>

namespace turboquant::app {
namespace {

std::string csv_cell(const nlohmann::ordered_json& value) {
    if (value.is_null() || (value.is_number_float() && !std::isfinite(value.get<double>()))) {
        return "";
    }
    if (!value.is_string()) {
        return value.dump();
    }
    const auto text = value.get<std::string>();
    if (text.find_first_of(",\"\n") == std::string::npos) {
        return text;
    }
    std::string quoted = "\"";
    for (const char c : text) {
        quoted += c == '"' ? "\"\"" : std::string(1, c);
    }
    return quoted + '"';
}

} // namespace

void add_eval_flags(CLI::App& command, EvalFlags& flags) {
    command
        .add_option("model,-m,--model", flags.model,
                    "GGUF file (default: TURBOQUANT_MODEL, else the one set-up installed)")
        ->type_name("MODEL");
    command
        .add_option(
            "--kv", flags.kv,
            "caches to compare, with commas between: tq6 tq5 tq4 tq3, bits K/V such as 5/4, auto, f16 q8_0 q5_1 q5_0 "
            "q4_0; tq4:w0:s4 sets window and sinks of one, tq4:self and tq4:off leave its profile out (calibrated from "
            "its first rows, not conditioned); q4_0-emulated is that format with our conditioning (default " +
                flags.kv + ")")
        ->type_name("LIST");
    command.add_option("--window", flags.window, "latest positions kept exact, of all settings of ours")
        ->type_name("N");
    command.add_option("--sinks", flags.sinks, "first positions kept exact, of all settings of ours")->type_name("N");
    command.add_option("--text", flags.text, "prose (the Debian handbook, default) or code (Python's library)")
        ->type_name("KIND");
    command.add_option("--file", flags.file, "a text of your own instead")->type_name("FILE");
    add_profile_flags(command, flags.profile);
    command.add_flag("--f32-weights", flags.f32_weights,
                     "measure with the weights dequantised to F32, so that only the cache counts (a copy is kept)");
    command.add_option("-t,--threads", flags.threads, "threads (default: physical cores)")->type_name("N");
    command.add_option("-o,--output", flags.output, "md, csv or json (default md)")->type_name("FORMAT");
    command.add_flag("--verbose", flags.verbose, "show libllama's log");
}

void check_flags(const EvalFlags& flags) {
    if (flags.output != "md" && flags.output != "csv" && flags.output != "json") {
        throw llm::UsageError(fmt::format("-o {}: use md, csv or json", flags.output));
    }
    if (flags.threads < 0 || flags.threads > 512) {
        throw llm::UsageError(fmt::format("--threads {}: use a number from 1 to 512", flags.threads));
    }
    if (flags.text && !flags.file.empty()) {
        throw llm::UsageError("--text and --file: one text is enough; leave one of them out");
    }
    if (flags.text && *flags.text != "prose" && *flags.text != "code") {
        throw llm::UsageError(
            fmt::format("--text {}: use prose or code, or --file with a text of your own", *flags.text));
    }
}

EvalModel::EvalModel(const EvalFlags& flags) : profile_(choose_profile(flags.profile)), threads_(flags.threads) {
    std::string path = llm::resolve_model_path(flags.model);
    label_ = std::filesystem::path(path).filename().string();
    if (flags.f32_weights) {
        path = llm::f32_copy(path, progress("dequantising " + label_));
        label_ += " (F32 weights)";
    }
    plan_ = std::make_unique<llm::ModelPlan>(path);
}

const llm::Model& EvalModel::load(bool turboquant) {
    std::unique_ptr<llm::Model>& model = models_[turboquant ? 1 : 0];
    if (!model) {
        model = std::make_unique<llm::Model>(llm::Model::load(plan_->path, turboquant, progress("loading " + label_)));
    }
    return *model;
}

llm::CachePlan EvalModel::cache_plan(int64_t context, const llm::KvChoice& kv) const {
    if (context > plan_->trained_context) {
        throw llm::UsageError(fmt::format("a context of {}: {} was trained for {}; use at most that", context, label_,
                                          plan_->trained_context));
    }
    llm::CachePlan plan = llm::full_cache_plan(plan_->plan(context));
    llm::check_fit(*plan_, plan, kv);
    return plan;
}

void EvalModel::use_profile(std::vector<llm::Setting>& settings) {
    const llm::CachePlan shapes = plan_->plan(1);
    std::string used;
    for (llm::Setting& setting : settings) {
        if (!llm::find_profile(plan_->path, profile_, shapes, setting.kv, print_note)) {
            llm::TuneOptions tuning;
            tuning.threads = threads_;
            tuning.interrupt = &interrupt_flag();
            tuning.progress = progress("measuring the keys of " + label_);
            const llm::Model& model = load(true);
            if (!temporary_profile_) {
                temporary_profile_ = llm::prepare_profile(model, *plan_, profile_, tuning, setting.kv, print_note);
            } else {
                setting.kv.profile = temporary_profile_->path();
            }
        }
        used = setting.kv.profile.empty() ? used : setting.kv.profile;
    }
    if (!used.empty()) {
        print_note(fmt::format("keys are conditioned by {} ({})", used, llm::load_profile(used, shapes).text));
    }
}

EvalText read_text(const EvalFlags& flags) {
    EvalText result;
    result.name = flags.file.empty() ? flags.text.value_or("prose") : flags.file;
    const std::string path = flags.file.empty() ? llm::sample_text(result.name) : flags.file;
    std::ifstream file(path, std::ios::binary);
    std::error_code ignored;
    if (!file || std::filesystem::is_directory(path, ignored)) {
        throw llm::Error(fmt::format("{}: cannot be read{}; check the path of --file", path,
                                     file ? "" : fmt::format(": {}", std::strerror(errno))));
    }
    result.text.assign(std::istreambuf_iterator<char>(file), {});
    return result;
}

void print_csv(const std::vector<nlohmann::ordered_json>& rows) {
    for (size_t i = 0; i < rows.size(); ++i) {
        std::string names;
        std::string cells;
        for (const auto& [name, value] : rows[i].items()) {
            if (!value.is_structured()) {
                names += (names.empty() ? "" : ",") + name;
                cells += (&value == &rows[i].front() ? "" : ",") + csv_cell(value);
            }
        }
        fmt::print("{}{}\n", i == 0 ? names + "\n" : "", cells);
    }
}

void print_json(const std::vector<nlohmann::ordered_json>& rows) {
    fmt::print("{}\n", nlohmann::ordered_json(rows).dump(2));
}

nlohmann::ordered_json setting_json(const EvalModel& model, const llm::Setting& setting, const llm::Footprint& size) {
    return {{"model", model.label()},
            {"kv", setting.label},
            {"bits_per_value", size.bits_per_value},
            {"bytes_per_token", size.bytes_per_token},
            {"exact_bytes", size.exact_bytes}};
}

Command add_eval(CLI::App& program) {
    CLI::App* eval = program.add_subcommand("eval", "what cache settings cost: kld, ppl (perplexity), niah (needles)");
    eval->require_subcommand(1);
    const std::vector<std::pair<std::string, Command>> commands = {
        {"kld", add_eval_kld(*eval)}, {"ppl", add_eval_ppl(*eval)}, {"niah", add_eval_niah(*eval)}};
    return [eval, commands] {
        for (const auto& [name, command] : commands) {
            if (eval->got_subcommand(name)) {
                return command();
            }
        }
        return 0;
    };
}

} // namespace turboquant::app
