// tq bench serve: load on an OpenAI-compatible server: throughput, latencies, cached prefixes, stalls, and how many conversations
// fit into a given memory; tq serve with each cache, beside a stock llama-server.
#include "bench.h"
#include "bench_load.h"
#include "bench_server.h"
#include "options.h"
#include "terminal.h"

#include "llm/error.h"
#include "llm/evaluation.h"
#include "llm/kv_choice.h"
#include "llm/model.h"
#include "llm/plan.h"

#include <algorithm>
#include <filesystem>
#include <functional>
#include <memory>
#include <set>

#include <fmt/format.h>

namespace turboquant::app {
namespace {

using Json = nlohmann::ordered_json;
using Table = std::vector<std::vector<std::string>>;

struct ServeBenchFlags {
    BenchFlags bench;
    std::string model;
    std::string kv = "f16,tq4";
    std::string url;
    std::string key;
    std::string llama_server;
    std::string llama_server_kv = "f16";
    std::string tests = "throughput,prefix,stall,memory";
    std::string clients = "1,2,4,8";
    int requests = 2;
    int64_t prompt_tokens = 64;
    int64_t answer_tokens = 96;
    int64_t prefix_tokens = 2048;
    int64_t long_tokens = 4096;
    int64_t memory_mib = 1024;
    int64_t check = 4;
};

// One server that is measured: started by us or given.
struct Contestant {
    std::string engine;
    std::string kv;
    ServerSpec spec;
    std::unique_ptr<ServerProcess> server;
    std::unique_ptr<PromptMaker> prompts;
};

double median(const std::vector<double>& values) {
    return spread_of(values).median;
}

// "p50", "p95", "p99", "max" of milliseconds, as keys and as cells.
void add_percentiles(Json& row, std::vector<std::string>& cells, const std::string& name,
                     const std::vector<double>& values) {
    for (const auto& [label, q] : {std::pair{"p50", 0.5}, {"p95", 0.95}, {"p99", 0.99}, {"max", 1.0}}) {
        const double value = values.empty() ? 0 : llm::quantile(values, q);
        row[fmt::format("{}_{}_ms", name, label)] = value;
        cells.push_back(fmt::format("{:.0f}", value));
    }
}

class ServeBench {
public:
    explicit ServeBench(const ServeBenchFlags& flags) : flags_(flags) {
        check_flags(flags.bench);
        for (const std::string& test : parse_words("--tests", flags.tests)) {
            if (test != "throughput" && test != "prefix" && test != "stall" && test != "memory") {
                throw llm::UsageError(
                    fmt::format("--tests {}: use throughput, prefix, stall or memory, with commas between", test));
            }
            tests_.insert(test);
        }
        clients_ = parse_numbers("--clients", flags.clients, 1, 256);
        check_range("--requests", flags.requests, 1, 100000);
        check_range("--prompt-tokens", flags.prompt_tokens, 16, 1 << 20);
        check_range("--answer-tokens", flags.answer_tokens, 2, 1 << 20);
        check_range("--prefix-tokens", flags.prefix_tokens, 64, 1 << 20);
        check_range("--long-tokens", flags.long_tokens, 512, 1 << 20);
        check_range("--memory", flags.memory_mib, 1, 1 << 20);
        check_range("--check", flags.check, 0, 256);
        choose_contestants();
    }

    int run() {
        fmt::print(stderr, "{}\n", machine_words());
        if (tests_.contains("throughput") || tests_.contains("prefix") || tests_.contains("stall")) {
            start_all();
            if (tests_.contains("throughput")) {
                measure_throughput();
            }
            if (tests_.contains("prefix")) {
                measure_prefix();
            }
            if (tests_.contains("stall")) {
                measure_stall();
            }
            for (Contestant& contestant : contestants_) {
                contestant.server.reset();
            }
        }
        if (tests_.contains("memory")) {
            measure_memory();
        }
        print();
        return 0;
    }

private:
    void choose_contestants() {
        if (!flags_.url.empty()) {
            if (!flags_.model.empty() || !flags_.llama_server.empty()) {
                throw llm::UsageError("--url: measures a server that runs; leave out MODEL and --llama-server");
            }
            tests_.erase("memory"); // its size is not ours to choose
            if (tests_.empty()) {
                throw llm::UsageError("--tests memory: starts servers of its own; leave out --url");
            }
            contestants_.push_back({flags_.url, "?", {}, nullptr, nullptr});
            return;
        }
        const std::string model = llm::resolve_model_path(flags_.model);
        llm::check_model_file(model);
        model_ = std::filesystem::path(model).filename().string();
        int threads = 0;
        if (!flags_.bench.threads.empty()) {
            const auto list = parse_numbers("--threads", flags_.bench.threads, 1, 512);
            if (list.size() != 1) {
                throw llm::UsageError("--threads: one number here");
            }
            threads = static_cast<int>(list.front());
        }
        const int64_t most = *std::max_element(clients_.begin(), clients_.end());
        // Each slot must hold the longest of what is asked; answers that run beside a long prompt are ended by us.
        int64_t context = flags_.prompt_tokens + flags_.answer_tokens;
        context = tests_.contains("prefix") ? std::max(context, flags_.prefix_tokens) : context;
        context = tests_.contains("stall") ? std::max(context, flags_.long_tokens) : context;
        const auto add = [&](const std::string& engine, const std::string& program, const std::string& kv) {
            llm::parse_kv(kv); // throws
            ServerSpec spec;
            spec.engine = engine;
            spec.program = program;
            spec.model = model;
            spec.kv = kv;
            spec.slots = std::max<int64_t>(most, tests_.contains("stall") ? kStreams + 1 : 1);
            spec.slot_context = (context + kMargin + 255) / 256 * 256;
            spec.threads = threads;
            contestants_.push_back({engine, kv, spec, nullptr, nullptr});
        };
        const std::string self = std::filesystem::read_symlink("/proc/self/exe").string();
        if (!flags_.kv.empty()) {
            for (const std::string& kv : parse_words("--kv", flags_.kv)) {
                add("tq serve", self, kv);
            }
        }
        if (!flags_.llama_server.empty()) {
            for (const std::string& kv : parse_words("--llama-server-kv", flags_.llama_server_kv)) {
                add("llama-server", flags_.llama_server, kv);
            }
        }
        if (contestants_.empty()) {
            throw llm::UsageError("nothing to measure: give --kv, --llama-server or --url");
        }
    }

    void start_all() {
        for (Contestant& contestant : contestants_) {
            if (flags_.url.empty()) {
                print_note(fmt::format("starting {} with {}: {} slots of {} tokens", contestant.engine, contestant.kv,
                                       contestant.spec.slots, contestant.spec.slot_context));
                contestant.server = std::make_unique<ServerProcess>(contestant.spec);
            } else {
                contestant.server = std::make_unique<ServerProcess>(Endpoint{flags_.url, flags_.key});
            }
            contestant.prompts = std::make_unique<PromptMaker>(contestant.server->endpoint());
        }
    }

    Json row_of(const std::string& test, const Contestant& contestant) const {
        return {{"test", test}, {"model", model_}, {"engine", contestant.engine}, {"kv", contestant.kv}};
    }

    // Round by round, so that a slow moment of the machine hits all.
    void each_round(const std::string& what, const std::function<void(size_t, Contestant&)>& measure) {
        const auto step = progress(what);
        double done = 0;
        for (int round = 0; round < flags_.bench.rounds; ++round) {
            for (size_t i = 0; i < contestants_.size(); ++i) {
                measure(i, contestants_[i]);
                ++done;
                if (step) {
                    step(done / static_cast<double>(contestants_.size()) / flags_.bench.rounds);
                }
            }
        }
    }

    void measure_throughput() {
        struct Figures {
            std::vector<double> speeds;
            std::vector<double> first;
            std::vector<double> between;
            int64_t answer_tokens = 0;
        };
        std::vector<std::vector<Figures>> figures(contestants_.size(), std::vector<Figures>(clients_.size()));
        int64_t prompt_tokens = 0;
        each_round("throughput", [&](size_t i, Contestant& contestant) {
            for (size_t c = 0; c < clients_.size(); ++c) {
                const LoadResult load =
                    run_load(contestant.server->endpoint(), *contestant.prompts, static_cast<int>(clients_[c]),
                             flags_.requests, flags_.prompt_tokens, flags_.answer_tokens);
                Figures& of = figures[i][c];
                of.speeds.push_back(load.answer_speed());
                of.first.insert(of.first.end(), load.first_token_ms.begin(), load.first_token_ms.end());
                of.between.insert(of.between.end(), load.between_tokens_ms.begin(), load.between_tokens_ms.end());
                of.answer_tokens += load.answer_tokens;
                prompt_tokens = load.prompt_tokens / (clients_[c] * flags_.requests);
            }
        });
        Table table = {{"engine", "cache", "clients", "tokens an answer", "tok/s", "x of one", "first token ms: p50",
                        "p95", "p99", "max", "between tokens ms: p50", "p95", "p99", "max"}};
        for (size_t i = 0; i < contestants_.size(); ++i) {
            const double alone = clients_.front() == 1 ? median(figures[i].front().speeds) : 0;
            for (size_t c = 0; c < clients_.size(); ++c) {
                const Figures& of = figures[i][c];
                const Spread speed = spread_of(of.speeds);
                Json row = row_of("throughput", contestants_[i]);
                row["clients"] = clients_[c];
                row["prompt_tokens"] = prompt_tokens;
                const double answer = static_cast<double>(of.answer_tokens) /
                                      static_cast<double>(clients_[c] * flags_.requests * flags_.bench.rounds);
                row["answer_tokens"] = answer;
                row["tok_s"] = speed.median;
                row["tok_s_sd"] = speed.deviation;
                row["x_of_one"] = alone > 0 ? speed.median / alone : 0;
                std::vector<std::string> cells = {contestants_[i].engine,
                                                  contestants_[i].kv,
                                                  std::to_string(clients_[c]),
                                                  fmt::format("{:.0f}", answer),
                                                  fmt::format("{:.1f} ± {:.1f}", speed.median, speed.deviation),
                                                  alone > 0 ? fmt::format("{:.2f}", speed.median / alone) : "-"};
                add_percentiles(row, cells, "first_token", of.first);
                add_percentiles(row, cells, "between_tokens", of.between);
                row["rounds"] = flags_.bench.rounds;
                objects_.push_back(row);
                table.push_back(cells);
            }
        }
        tables_.emplace_back(
            fmt::format("Throughput: prompts of {} tokens, answers of at most {}", prompt_tokens, flags_.answer_tokens),
            table);
    }

    void measure_prefix() {
        std::vector<std::vector<PrefixResult>> results(contestants_.size());
        each_round("prefix", [&](size_t i, Contestant& contestant) {
            results[i].push_back(run_prefix(contestant.server->endpoint(), *contestant.prompts, flags_.prefix_tokens));
        });
        Table table = {{"engine", "cache", "prefix", "cached", "first token ms: read", "cached", "ratio"}};
        for (size_t i = 0; i < contestants_.size(); ++i) {
            std::vector<double> uncached;
            std::vector<double> cached;
            std::vector<double> tokens;
            for (const PrefixResult& result : results[i]) {
                uncached.push_back(result.uncached_ms);
                cached.push_back(result.cached_ms);
                tokens.push_back(static_cast<double>(result.cached_tokens));
            }
            Json row = row_of("prefix", contestants_[i]);
            row["prompt_tokens"] = results[i].front().prefix_tokens;
            row["cached_tokens"] = static_cast<int64_t>(median(tokens));
            row["uncached_ms"] = median(uncached);
            row["cached_ms"] = median(cached);
            row["ratio"] = median(cached) / median(uncached);
            row["rounds"] = flags_.bench.rounds;
            table.push_back({contestants_[i].engine, contestants_[i].kv,
                             std::to_string(results[i].front().prefix_tokens), fmt::format("{:.0f}", median(tokens)),
                             fmt::format("{:.0f}", median(uncached)), fmt::format("{:.0f}", median(cached)),
                             fmt::format("{:.3f}", median(cached) / median(uncached))});
            objects_.push_back(row);
        }
        tables_.emplace_back("A prefix that was read, then one that is cached", table);
    }

    void measure_stall() {
        std::vector<std::vector<StallResult>> results(contestants_.size());
        each_round("stall", [&](size_t i, Contestant& contestant) {
            results[i].push_back(
                run_stall(contestant.server->endpoint(), *contestant.prompts, kStreams, flags_.long_tokens));
        });
        Table table = {{"engine", "cache", "streams", "prompt", "read s", "between tokens ms: before", "meanwhile: p50",
                        "p95", "p99", "max", "longest, median of rounds"}};
        for (size_t i = 0; i < contestants_.size(); ++i) {
            std::vector<double> between;
            std::vector<double> stalls;
            std::vector<double> reads;
            std::vector<double> usual;
            for (const StallResult& result : results[i]) {
                between.insert(between.end(), result.between_ms.begin(), result.between_ms.end());
                stalls.push_back(result.stall_ms);
                reads.push_back(result.read_ms);
                usual.push_back(result.usual_ms);
            }
            Json row = row_of("stall", contestants_[i]);
            row["streams"] = kStreams;
            row["prompt_tokens"] = results[i].front().prompt_tokens;
            row["read_ms"] = median(reads);
            row["usual_ms"] = median(usual);
            std::vector<std::string> cells = {contestants_[i].engine,
                                              contestants_[i].kv,
                                              std::to_string(kStreams),
                                              std::to_string(results[i].front().prompt_tokens),
                                              fmt::format("{:.1f}", median(reads) / 1000),
                                              fmt::format("{:.0f}", median(usual))};
            add_percentiles(row, cells, "between_tokens", between);
            row["stall_ms"] = median(stalls);
            row["rounds"] = flags_.bench.rounds;
            cells.push_back(fmt::format("{:.0f}", median(stalls)));
            objects_.push_back(row);
            table.push_back(cells);
        }
        tables_.emplace_back("Running streams while a long prompt is read", table);
    }

    // How many conversations fit: from two sizes that were allocated, then by starting a server of that many slots.
    void measure_memory() {
        const int64_t memory = flags_.memory_mib << 20;
        Table table = {
            {"engine", "cache", "conversations", "of tokens", "KV MiB", "MiB each", "x of the first", "run", "held"}};
        int64_t first = 0;
        for (Contestant& contestant : contestants_) {
            ServerSpec spec = contestant.spec;
            spec.slot_context = (flags_.long_tokens + 255) / 256 * 256;
            const auto bytes_of = [&](int64_t slots) {
                spec.slots = slots;
                print_note(fmt::format("memory: {} with {}, {} slots", contestant.engine, contestant.kv, slots));
                return ServerProcess(spec).kv_bytes();
            };
            const int64_t one = bytes_of(1);
            const int64_t five = bytes_of(5);
            if (one <= 0 || five <= one) {
                throw llm::Error(fmt::format("{} with {} does not say how many bytes its cache has", contestant.engine,
                                             contestant.kv));
            }
            const double each = static_cast<double>(five - one) / 4;
            int64_t fit = 1 + static_cast<int64_t>(static_cast<double>(memory - one) / each);
            fit = std::clamp<int64_t>(fit, 0, kMostSlots);
            int64_t bytes = 0;
            int64_t checked = 0;
            int64_t held = 0;
            for (; fit > 0; --fit) { // the estimate may be one too many
                spec.slots = fit;
                print_note(fmt::format("memory: {} with {}, {} slots", contestant.engine, contestant.kv, fit));
                const ServerProcess server(spec);
                bytes = server.kv_bytes();
                if (bytes <= memory) {
                    checked = std::min(flags_.check, fit);
                    PromptMaker prompts(server.endpoint());
                    // Room for the question that goes on with it and a token.
                    held = checked > 0
                               ? count_held(server.endpoint(), prompts, checked, flags_.long_tokens - kMargin / 2)
                               : 0;
                    break;
                }
            }
            first = first == 0 ? fit : first;
            Json row = row_of("memory", contestant);
            row["memory_bytes"] = memory;
            row["tokens"] = flags_.long_tokens;
            row["conversations"] = fit;
            row["kv_bytes"] = bytes;
            row["kv_bytes_each"] = each;
            row["x_of_first"] = first > 0 ? static_cast<double>(fit) / static_cast<double>(first) : 0;
            row["checked"] = checked;
            row["held"] = held;
            objects_.push_back(row);
            table.push_back(
                {contestant.engine, contestant.kv, std::to_string(fit), std::to_string(flags_.long_tokens),
                 fmt::format("{:.1f}", static_cast<double>(bytes) / (1 << 20)), fmt::format("{:.2f}", each / (1 << 20)),
                 first > 0 ? fmt::format("{:.2f}", static_cast<double>(fit) / static_cast<double>(first)) : "-",
                 std::to_string(checked), std::to_string(held)});
        }
        tables_.emplace_back(fmt::format("Conversations in {} MiB", flags_.memory_mib), table);
    }

    void print() {
        if (flags_.bench.output != "md") {
            // A CSV has one header: every row gets every key.
            std::vector<std::string> keys;
            for (const Json& object : objects_) {
                for (const auto& [key, value] : object.items()) {
                    if (std::find(keys.begin(), keys.end(), key) == keys.end()) {
                        keys.push_back(key);
                    }
                }
            }
            if (flags_.bench.output == "csv") {
                for (Json& object : objects_) {
                    Json full;
                    for (const std::string& key : keys) {
                        full[key] = object.contains(key) ? object[key] : Json("");
                    }
                    object = full;
                }
            }
            print_results(flags_.bench, objects_, {}, 0);
            return;
        }
        for (size_t i = 0; i < tables_.size(); ++i) {
            fmt::print("{}{}\n\n", i > 0 ? "\n" : "", tables_[i].first);
            print_table(tables_[i].second, 2);
        }
    }

    static constexpr int kStreams = 3;
    static constexpr int64_t kMargin = 256;   // questions and short answers behind a prefix, prompts a little too long
    static constexpr int64_t kMostSlots = 64; // what tq serve --parallel takes

    ServeBenchFlags flags_;
    std::set<std::string> tests_;
    std::vector<int64_t> clients_;
    std::string model_;
    std::vector<Contestant> contestants_;
    std::vector<Json> objects_;
    std::vector<std::pair<std::string, Table>> tables_;
};

} // namespace

Command add_bench_serve(CLI::App& bench) {
    CLI::App* command =
        bench.add_subcommand("serve", "load on tq serve (or any OpenAI-compatible server): tok/s, latencies, memory");
    auto flags = std::make_shared<ServeBenchFlags>();
    flags->bench.rounds = 3;
    add_bench_flags(*command, flags->bench);
    command->add_option("model,-m,--model", flags->model, "GGUF file")->type_name("MODEL");
    command->add_option("--kv", flags->kv, "caches of tq serve, with commas between (default f16,tq4); '': none")
        ->type_name("LIST");
    command->add_option("--url", flags->url, "a server that runs, in place of those started here")->type_name("URL");
    command->add_option("--api-key", flags->key, "its key")->type_name("KEY");
    command->add_option("--llama-server", flags->llama_server, "a stock llama-server to measure beside")
        ->type_name("PROGRAM");
    command
        ->add_option("--llama-server-kv", flags->llama_server_kv, "its caches: own ones or the plug-in's (default f16)")
        ->type_name("LIST");
    command->add_option("--tests", flags->tests, "throughput, prefix, stall, memory (default: all)")->type_name("LIST");
    command->add_option("--clients", flags->clients, "clients at once (default 1,2,4,8)")->type_name("LIST");
    command->add_option("--requests", flags->requests, "of each client in a round (default 2)")->type_name("N");
    command->add_option("--prompt-tokens", flags->prompt_tokens, "of a prompt (default 64)")->type_name("N");
    command->add_option("--answer-tokens", flags->answer_tokens, "of an answer (default 96)")->type_name("N");
    command->add_option("--prefix-tokens", flags->prefix_tokens, "of the prefix that is cached (default 2048)")
        ->type_name("N");
    command
        ->add_option("--long-tokens", flags->long_tokens,
                     "of the prompt that others wait for, and of conversations in memory (default 4096)")
        ->type_name("N");
    command->add_option("--memory", flags->memory_mib, "MiB that conversations must fit into (default 1024)")
        ->type_name("MIB");
    command->add_option("--check", flags->check, "conversations of that server that are really held (default 4)")
        ->type_name("N");
    return [flags] { return ServeBench(*flags).run(); };
}

} // namespace turboquant::app
