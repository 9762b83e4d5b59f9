// What the commands below `tq eval` share: flags, the text, the models, the output.
#pragma once

#include "commands.h"

#include "llm/evaluation.h"
#include "llm/tuning.h"

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

namespace turboquant::app {

struct EvalFlags {
    std::string model;
    llm::ProfileFlags profile;
    std::string kv = "q8_0,q5_1,q4_0,tq6,tq5,tq4,tq3";
    std::optional<int> window;
    std::optional<int> sinks;
    std::string file;
    std::optional<std::string> text;
    std::string output = "md";
    int threads = 0;
    bool f32_weights = false;
    bool verbose = false;
};
void add_eval_flags(CLI::App& command, EvalFlags& flags);
void check_flags(const EvalFlags& flags);

// The model of a run, loaded with and without the plug-in as settings need it.
class EvalModel {
public:
    // Makes the F32 copy where that was asked for.
    explicit EvalModel(const EvalFlags& flags);

    const llm::ModelPlan& plan() const { return *plan_; }
    const llm::Model& load(bool turboquant);
    const std::string& label() const { return label_; }
    // Of a context whose sliding layers keep all rows. UsageError when the model was not trained for it; Error when
    // `kv` with it does not fit into memory.
    llm::CachePlan cache_plan(int64_t context, const llm::KvChoice& kv) const;
    // Gives all settings of ours the model's profile, made of the whole built-in text where there is none; says which.
    void use_profile(std::vector<llm::Setting>& settings);

private:
    std::unique_ptr<llm::ModelPlan> plan_;
    std::unique_ptr<llm::Model> models_[2];
    llm::ProfileFlags profile_;
    std::unique_ptr<llm::TemporaryProfile> temporary_profile_;
    int threads_ = 0;
    std::string label_;
};

struct EvalText {
    std::string name; // "prose", "code" or the file
    std::string text;
};
EvalText read_text(const EvalFlags& flags);

// Rows with the same keys as CSV or as a JSON array, on standard output. Numbers that are not there are empty or null.
void print_csv(const std::vector<nlohmann::ordered_json>& rows);
void print_json(const std::vector<nlohmann::ordered_json>& rows);

// Keys of every row: model, kv, bits_per_value, bytes_per_token, exact_bytes.
nlohmann::ordered_json setting_json(const EvalModel& model, const llm::Setting& setting, const llm::Footprint& size);

Command add_eval_kld(CLI::App& eval);
Command add_eval_ppl(CLI::App& eval);
Command add_eval_niah(CLI::App& eval);

} // namespace turboquant::app
