// What tq bench decode and prefill share: the model (a GGUF or a synthetic one), a context for each cache, depths.
#pragma once

#include "bench.h"
#include "eval.h"

#include "llm/depth_context.h"
#include "llm/evaluation.h"

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace turboquant::app {

struct ModelBenchFlags {
    BenchFlags bench;
    std::string model;
    std::string synthetic;
    std::string kv = "f16,q8_0,q4_0,tq4";
    std::string depth = "0,4096,16384,32768";
    std::string prefill = "tiled";
    int64_t tile = 2048;
    llm::ProfileFlags profile;
};
void add_model_bench_flags(CLI::App& command, ModelBenchFlags& flags);

// One setting at one depth.
struct Point {
    const llm::Setting* setting = nullptr;
    llm::DepthContext* context = nullptr;
    int64_t depth = 0;
};

class ModelBench {
public:
    // Checks flags; finds or makes the model and the settings' profiles. `longest`: tokens measured behind each depth.
    ModelBench(const ModelBenchFlags& flags, int64_t longest);

    // For each number of threads and each depth, ascending: brings all settings' contexts there and calls
    // measure(points), which goes over them round by round.
    using Measure = std::function<void(const std::vector<Point>& points)>;
    void run(const Measure& measure);

    // model, engine, kv, threads, depth; then what `figures` holds; then kv_bytes and how it was measured.
    nlohmann::ordered_json row(const Point& point, const nlohmann::ordered_json& figures,
                               int64_t measured_tokens) const;
    // Cells of the table before and after the test's name: model, size, params, engine, cache, KV, threads.
    static std::vector<std::string> titles();
    std::vector<std::string> cells(const Point& point, int64_t measured_tokens) const;
    // "@ d4096", "" at 0.
    static std::string depth_words(int64_t depth);

private:
    int64_t kv_bytes(const Point& point, int64_t measured_tokens) const;
    std::string prefill_of(const Point& point) const;
    void check_memory() const;
    void choose_conditioning();

    ModelBenchFlags flags_;
    int64_t longest_ = 0;
    std::vector<int64_t> depths_;
    std::vector<int64_t> threads_;
    std::vector<llm::Setting> settings_;
    EvalFlags model_flags_;
    std::unique_ptr<EvalModel> model_;
    std::string label_;
    std::string note_; // how a synthetic model differs from its namesake
};

} // namespace turboquant::app
