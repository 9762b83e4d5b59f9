#include "bench_model.h"

#include "options.h"
#include "terminal.h"

#include "llm/error.h"
#include "llm/log.h"
#include "llm/synthetic_model.h"
#include "llm/sysinfo.h"

#include <algorithm>
#include <filesystem>

#include <fmt/format.h>

namespace turboquant::app {
namespace {

constexpr int64_t kGranularity = 256; // of libllama's contexts
constexpr int64_t kDeepest = 1 << 22;

int64_t padded(int64_t cells) {
    return (cells + kGranularity - 1) / kGranularity * kGranularity;
}

} // namespace

void add_model_bench_flags(CLI::App& command, ModelBenchFlags& flags) {
    command
        .add_option("model,-m,--model", flags.model,
                    "GGUF file (default: TURBOQUANT_MODEL, else the one set-up installed)")
        ->type_name("MODEL");
    command
        .add_option("--synthetic", flags.synthetic,
                    "a model of that shape with random weights instead, kept in the cache folder: " +
                        llm::synthetic_names())
        ->type_name("NAME");
    command
        .add_option(
            "--kv", flags.kv,
            "caches to compare: tq6 tq5 tq4 tq3, bits K/V such as 5/4, auto, f16 q8_0 q5_1 q5_0 q4_0; suffixes as "
            "in tq eval (default " +
                flags.kv + ")")
        ->type_name("LIST");
    command.add_option("-d,--depth", flags.depth, "tokens that the cache holds (default " + flags.depth + ")")
        ->type_name("LIST");
    command
        .add_option("--prefill", flags.prefill,
                    "how the depth is reached: tiled (a piece is read, and its state restored as often as it takes; "
                    "default) or real (all of it is read)")
        ->type_name("HOW");
    command.add_option("--tile", flags.tile, "tokens of that piece (default 2048)")->type_name("N");
    add_profile_flags(command, flags.profile);
    add_bench_flags(command, flags.bench);
}

ModelBench::ModelBench(const ModelBenchFlags& flags, int64_t longest) : flags_(flags), longest_(longest) {
    check_flags(flags.bench);
    depths_ = parse_numbers("--depth", flags.depth, 0, kDeepest);
    std::sort(depths_.begin(), depths_.end());
    depths_.erase(std::unique(depths_.begin(), depths_.end()), depths_.end());
    threads_ = flags.bench.threads.empty() ? std::vector<int64_t>{llm::default_threads()}
                                           : parse_numbers("--threads", flags.bench.threads, 1, 512);
    if (flags.prefill != "tiled" && flags.prefill != "real") {
        throw llm::UsageError(fmt::format("--prefill {}: use tiled or real", flags.prefill));
    }
    if (flags.tile < 1 || flags.tile > kDeepest) {
        throw llm::UsageError(fmt::format("--tile {}: use a number of tokens from 1 to {}", flags.tile, kDeepest));
    }
    if (!flags.synthetic.empty() && !flags.model.empty()) {
        throw llm::UsageError("--model and --synthetic: one model is enough; leave one of them out");
    }
    settings_ = llm::parse_settings(flags.kv, {}, {});
    model_flags_.model = flags.model;
    model_flags_.profile = flags.profile;
    model_flags_.threads = static_cast<int>(*std::max_element(threads_.begin(), threads_.end()));
    llm::install_log(flags.bench.verbose);
    catch_interrupts();
    if (!flags.synthetic.empty()) {
        const llm::SyntheticShape& shape = llm::find_synthetic_shape(flags.synthetic);
        model_flags_.model = llm::synthetic_model(shape, progress(fmt::format("writing the model {}", shape.name)));
        note_ = shape.note;
        label_ = shape.name;
    }
    model_ = std::make_unique<EvalModel>(model_flags_);
    label_ = label_.empty() ? std::filesystem::path(model_->plan().path).stem().string() : label_;
    check_memory();
    choose_conditioning();
}

// All caches are in memory at once, so that rounds can be interleaved.
void ModelBench::check_memory() const {
    const llm::ModelPlan& plan = model_->plan();
    const llm::CachePlan cache = plan.plan(padded(depths_.back() + longest_));
    int64_t needed = plan.weight_bytes;
    for (const llm::Setting& setting : settings_) {
        needed += llm::kv_bytes(cache, setting.kv) + cache.recurrent_bytes + cache.compute_bytes;
    }
    const llm::FreeMemory memory = llm::free_memory();
    if (memory.bytes >= 0 && needed > memory.bytes) {
        throw llm::Error(
            fmt::format("--depth {}: the caches {} beside each other need {} (weights {}), {} leaves {}; use "
                        "a smaller --depth or fewer --kv",
                        depths_.back(), flags_.kv, llm::format_bytes(needed), llm::format_bytes(plan.weight_bytes),
                        memory.source, llm::format_bytes(memory.bytes)));
    }
}

// Keys of ours: a model's profile as in tq run; random weights have none worth keeping, so their caches calibrate
// themselves on their first rows.
void ModelBench::choose_conditioning() {
    const bool own = !flags_.synthetic.empty() && flags_.profile.path.empty();
    if (!own) {
        model_->use_profile(settings_);
        return;
    }
    bool said = false;
    for (llm::Setting& setting : settings_) {
        if (!setting.kv.turboquant() || setting.kv.pass_through() || setting.kv.calibrate) {
            continue;
        }
        if (setting.kv.automatic) {
            throw llm::UsageError("--kv auto: takes its bits from a profile; a synthetic model needs --profile for it");
        }
        setting.kv.calibrate = true;
        if (!said) {
            print_note("keys are conditioned from the cache's first rows (a synthetic model has no profile)");
            said = true;
        }
    }
}

void ModelBench::run(const Measure& measure) {
    const llm::CachePlan plan = model_->plan().plan(padded(depths_.back() + longest_));
    print_note(fmt::format("{}; {}", machine_words(), model_->plan().description));
    if (!note_.empty()) {
        print_note(fmt::format("{}: {}", label_, note_));
    }
    const int64_t tile = flags_.prefill == "real" ? 0 : flags_.tile;
    for (const int64_t threads : threads_) {
        std::vector<std::unique_ptr<llm::DepthContext>> contexts;
        for (const llm::Setting& setting : settings_) {
            llm::DepthOptions options;
            options.kv = setting.kv;
            options.head_size = llm::shared_head_size(plan);
            options.capacity = padded(depths_.back() + longest_);
            options.tile = tile;
            options.threads = static_cast<int>(threads);
            options.interrupt = &interrupt_flag();
            const llm::Model& model = model_->load(setting.kv.turboquant());
            contexts.push_back(std::make_unique<llm::DepthContext>(model, options));
            if (contexts.size() == 1 && tile > 0 && depths_.back() > tile && !llm::DepthContext::can_tile(model)) {
                print_note(
                    fmt::format("{}: has sliding or recurrent layers, so every depth is read, not tiled", label_));
            }
        }
        for (const int64_t depth : depths_) {
            std::vector<Point> points;
            for (size_t i = 0; i < settings_.size(); ++i) {
                contexts[i]->fill(depth, progress(fmt::format("{}: filling {}", settings_[i].label, depth)));
                points.push_back({&settings_[i], contexts[i].get(), depth});
            }
            measure(points);
        }
    }
}

std::string ModelBench::depth_words(int64_t depth) {
    return depth > 0 ? fmt::format(" @ d{}", depth) : "";
}

int64_t ModelBench::kv_bytes(const Point& point, int64_t measured_tokens) const {
    return llm::kv_bytes(model_->plan().plan(padded(point.depth + measured_tokens)), point.setting->kv);
}

std::string ModelBench::prefill_of(const Point& point) const {
    return point.depth == 0 ? "none" : point.context->copies() > 1 ? "tiled" : "real";
}

nlohmann::ordered_json ModelBench::row(const Point& point, const nlohmann::ordered_json& figures,
                                       int64_t measured_tokens) const {
    const llm::KvChoice& kv = point.setting->kv;
    nlohmann::ordered_json result = {{"model", label_},
                                     {"engine", kv.turboquant() ? "turboquant" : "llama.cpp"},
                                     {"kv", point.setting->label},
                                     {"threads", point.context->threads()},
                                     {"depth", point.depth}};
    result.update(figures);
    result["kv_bytes"] = kv_bytes(point, measured_tokens);
    result["prefill"] = prefill_of(point);
    result["conditioning"] = !kv.turboquant() || kv.pass_through() ? "none"
                             : !kv.profile.empty()                 ? "profile"
                             : kv.calibrate.value_or(true)         ? "first rows"
                                                                   : "none";
    result["file"] = model_->plan().path;
    result["weight_bytes"] = model_->plan().weight_bytes;
    result["parameters"] = model_->plan().parameters;
    return result;
}

std::vector<std::string> ModelBench::titles() {
    return {"model", "size", "params", "engine", "cache", "KV", "threads", "test"};
}

std::vector<std::string> ModelBench::cells(const Point& point, int64_t measured_tokens) const {
    const auto parameters = static_cast<double>(model_->plan().parameters);
    return {label_,
            llm::format_bytes(model_->plan().weight_bytes),
            fmt::format("{:.2f} {}", parameters >= 1e9 ? parameters * 1e-9 : parameters * 1e-6,
                        parameters >= 1e9 ? "B" : "M"),
            point.setting->kv.turboquant() ? "turboquant" : "llama.cpp",
            point.setting->label,
            llm::format_bytes(kv_bytes(point, measured_tokens)),
            std::to_string(point.context->threads())};
}

} // namespace turboquant::app
