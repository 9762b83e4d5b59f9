// tq bench decode, tq bench prefill: tokens a second at depths, with our caches and llama.cpp's own in the same process,
// round by round.
#include "bench_model.h"
#include "terminal.h"

#include "llm/error.h"

#include <algorithm>

#include <fmt/format.h>

namespace turboquant::app {
namespace {

using Json = nlohmann::ordered_json;

struct SpeedFlags {
    ModelBenchFlags model;
    std::string tokens = "32"; // decode: one number
    std::string prompt = "512";
};

class SpeedRun {
public:
    SpeedRun(const SpeedFlags& flags, bool decode) : flags_(flags), decode_(decode) {
        lengths_ = decode ? parse_numbers("-n", flags.tokens, 1, 1 << 20)
                          : parse_numbers("--prompt", flags.prompt, 1, 1 << 20);
        // Decoding warms up with one token more.
        bench_ = std::make_unique<ModelBench>(flags.model, *std::max_element(lengths_.begin(), lengths_.end()) + 1);
    }

    int run() {
        bench_->run([&](const std::vector<Point>& points) {
            for (const int64_t length : lengths_) {
                measure(points, length);
            }
        });
        std::vector<std::vector<std::string>> table = {ModelBench::titles()};
        table.front().insert(table.front().end(), {"tok/s", first_});
        table.insert(table.end(), table_.begin(), table_.end());
        print_results(flags_.model.bench, objects_, table, 8);
        return 0;
    }

private:
    void measure(const std::vector<Point>& points, int64_t length) {
        const int rounds = flags_.model.bench.rounds;
        const auto step = progress(fmt::format("{}{}", test(length), ModelBench::depth_words(points.front().depth)));
        std::vector<std::vector<double>> speeds(points.size());
        double done = 0;
        for (int round = 0; round < rounds; ++round) {
            for (size_t i = 0; i < points.size(); ++i) {
                llm::DepthContext& context = *points[i].context;
                const double seconds = decode_ ? context.decode(length) : context.read(length);
                speeds[i].push_back(static_cast<double>(length) / seconds);
                ++done;
                if (step) { // stderr is a terminal
                    step(done / static_cast<double>(points.size()) / rounds);
                }
            }
        }
        first_ = "x " + points.front().setting->label;
        const double base = spread_of(speeds.front()).median;
        for (size_t i = 0; i < points.size(); ++i) {
            const Spread speed = spread_of(speeds[i]);
            Json figures = {{"tok_s", speed.median}, {"tok_s_sd", speed.deviation}};
            figures[decode_ ? "tokens" : "prompt"] = length;
            figures["rounds"] = rounds;
            figures["tok_s_rounds"] = speeds[i];
            objects_.push_back(bench_->row(points[i], figures, length));
            std::vector<std::string> cells = bench_->cells(points[i], length);
            cells.insert(cells.end(), {test(length) + ModelBench::depth_words(points[i].depth),
                                       fmt::format("{:.2f} ± {:.2f}", speed.median, speed.deviation),
                                       fmt::format("{:.2f}", speed.median / base)});
            table_.push_back(cells);
        }
    }

    std::string test(int64_t length) const { return fmt::format("{}{}", decode_ ? "tg" : "pp", length); }

    SpeedFlags flags_;
    bool decode_;
    std::vector<int64_t> lengths_;
    std::unique_ptr<ModelBench> bench_;
    std::vector<Json> objects_;
    std::vector<std::vector<std::string>> table_;
    std::string first_;
};

} // namespace

Command add_bench_decode(CLI::App& bench) {
    CLI::App* command = bench.add_subcommand("decode", "tok/s of answering at depths, with each cache");
    auto flags = std::make_shared<SpeedFlags>();
    add_model_bench_flags(*command, flags->model);
    command->add_option("-n", flags->tokens, "tokens decoded in a round (default 32)")->type_name("LIST");
    return [flags] { return SpeedRun(*flags, true).run(); };
}

Command add_bench_prefill(CLI::App& bench) {
    CLI::App* command = bench.add_subcommand("prefill", "tok/s of reading prompts at depths, with each cache");
    auto flags = std::make_shared<SpeedFlags>();
    flags->model.depth = "0,4096";
    add_model_bench_flags(*command, flags->model);
    command->add_option("-p,--prompt", flags->prompt, "tokens of the prompts (default 512)")->type_name("LIST");
    return [flags] { return SpeedRun(*flags, false).run(); };
}

} // namespace turboquant::app
