// tq bench attention: ns per query head and cached token, over shapes, bits and instruction sets, beside ggml's kernels.
#include "bench.h"
#include "bench_engines.h"
#include "terminal.h"

#include "llm/error.h"
#include "llm/kv_choice.h"
#include "llm/log.h"
#include "llm/plan.h"
#include "llm/sysinfo.h"

#include <algorithm>
#include <chrono>

#include <fmt/format.h>

namespace turboquant::app {
namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

struct AttentionFlags {
    BenchFlags bench;
    std::string head_dim = "128";
    std::string kv_heads = "8";
    std::string group = "4";
    std::string context = "32768";
    std::string queries = "1";
    std::string kv = "4/4,f16,q8_0,q4_0";
    std::string isa;
    std::string engines = "turboquant,reference,ggml";
    std::string layouts = "token-major,head-major";
    int cold_mib = 0;
    int least_ms = 50;
    bool conditioned = false;
    bool mask = false;
};

std::vector<std::string> choose(const std::string& flag, const std::string& list,
                                const std::vector<std::string>& known) {
    std::vector<std::string> words = parse_words(flag, list);
    for (const std::string& word : words) {
        if (std::find(known.begin(), known.end(), word) == known.end()) {
            throw llm::UsageError(fmt::format("{} {}: unknown; use {}", flag, word, fmt::join(known, ", ")));
        }
    }
    return words;
}

bool has(const std::vector<std::string>& words, const std::string& word) {
    return std::find(words.begin(), words.end(), word) != words.end();
}

// One engine's figures, a value a round.
struct Measured {
    AttentionEngine* engine = nullptr;
    std::vector<double> ns;
    std::vector<double> gb;
    std::vector<double> ratio;
};

class AttentionRun {
public:
    explicit AttentionRun(const AttentionFlags& flags) : flags_(flags) {
        check_flags(flags.bench);
        head_dims_ = parse_numbers("--head-dim", flags.head_dim, 4, 1024);
        for (const int64_t size : head_dims_) {
            if (size % 4 != 0) {
                throw llm::UsageError(fmt::format("--head-dim {}: use a multiple of 4", size));
            }
        }
        kv_heads_ = parse_numbers("--kv-heads", flags.kv_heads, 1, 1024);
        groups_ = parse_numbers("--group", flags.group, 1, 256);
        contexts_ = parse_numbers("--context", flags.context, 1, 1 << 24);
        queries_ = parse_numbers("--queries", flags.queries, 1, 4096);
        threads_ = flags.bench.threads.empty() ? std::vector<int64_t>{llm::default_threads()}
                                               : parse_numbers("--threads", flags.bench.threads, 1, 512);
        isas_ = choose_isas(flags.isa);
        engines_ = choose("--engine", flags.engines, {"turboquant", "reference", "ggml"});
        layouts_ = choose("--layout", flags.layouts, {"token-major", "head-major"});
        for (const std::string& word : parse_words("--kv", flags.kv)) {
            llm::KvChoice choice = llm::parse_kv(word);
            if (choice.automatic || choice.emulate_q4_0) {
                throw llm::UsageError(
                    fmt::format("--kv {}: has no kernel of its own; use bits such as 4/4, f16, q8_0 or "
                                "q4_0",
                                word));
            }
            caches_.push_back(choice);
        }
        if (flags.cold_mib < 0 || flags.cold_mib > 1 << 20) {
            throw llm::UsageError(fmt::format("--cold {}: use a number of MiB from 1", flags.cold_mib));
        }
        if (flags.least_ms < 1 || flags.least_ms > 60000) {
            throw llm::UsageError(
                fmt::format("--least {}: use a number of milliseconds from 1 to 60000", flags.least_ms));
        }
        cold_ =
            flags.cold_mib > 0 ? int64_t{flags.cold_mib} << 20 : std::max<int64_t>(3 * last_level_cache(), 64 << 20);
        check_selection();
        list_shapes();
        llm::install_log(flags.bench.verbose);
        catch_interrupts();
    }

    int run() {
        print_note(machine_words());
        std::unique_ptr<PureRead> read;
        int threads = 0;
        for (const AttentionShape& shape : shapes_) {
            if (shape.threads != threads) {
                threads = shape.threads;
                read = std::make_unique<PureRead>(cold_, threads);
            }
            measure(shape, *read);
        }
        print();
        return 0;
    }

private:
    bool wants_ours(const llm::KvChoice& cache) const {
        return cache.turboquant() && !cache.pass_through() && has(engines_, "turboquant");
    }
    bool wants_reference(const llm::KvChoice& cache) const {
        return (cache.host_type == "f16" || cache.pass_through()) && has(engines_, "reference");
    }
    bool wants_ggml(const llm::KvChoice& cache) const { return !cache.turboquant() && has(engines_, "ggml"); }

    void check_selection() const {
        if (std::none_of(caches_.begin(), caches_.end(), [&](const llm::KvChoice& cache) {
                return wants_ours(cache) || wants_reference(cache) || wants_ggml(cache);
            })) {
            throw llm::UsageError(
                fmt::format("--kv {} with --engine {}: leaves nothing to measure", flags_.kv, flags_.engines));
        }
    }

    void list_shapes() {
        for (const int64_t threads : threads_) {
            for (const int64_t head_dim : head_dims_) {
                for (const int64_t kv_heads : kv_heads_) {
                    for (const int64_t group : groups_) {
                        for (const int64_t context : contexts_) {
                            for (const int64_t queries : queries_) {
                                AttentionShape shape;
                                shape.head_dim = static_cast<int>(head_dim);
                                shape.kv_heads = static_cast<int>(kv_heads);
                                shape.group = static_cast<int>(group);
                                shape.context = context;
                                shape.queries = queries;
                                shape.threads = static_cast<int>(threads);
                                shape.conditioned = flags_.conditioned;
                                shape.mask = flags_.mask;
                                shape.cold_bytes = cold_;
                                check_memory(shape);
                                shapes_.push_back(shape);
                            }
                        }
                    }
                }
            }
        }
    }

    std::vector<std::unique_ptr<AttentionEngine>> make_engines(const AttentionShape& shape) const {
        std::vector<std::unique_ptr<AttentionEngine>> engines;
        const auto ours = [&](int key_bits, int value_bits) {
            for (auto& engine : make_our_engines(shape, key_bits, value_bits, isas_)) {
                engines.push_back(std::move(engine));
            }
        };
        for (const llm::KvChoice& cache : caches_) {
            if (wants_reference(cache)) {
                ours(16, 16);
            }
            if (wants_ours(cache)) {
                ours(cache.key_bits, cache.value_bits);
            }
            if (wants_ggml(cache)) {
                const ggml_type type = ggml_cache_type(cache.host_type);
                if (shape.head_dim % ggml_blck_size(type) != 0) {
                    print_note(fmt::format("ggml's {} needs heads of a multiple of {}: left out at {}", cache.host_type,
                                           ggml_blck_size(type), shape.head_dim));
                    continue;
                }
                for (const std::string& layout : layouts_) {
                    engines.push_back(make_ggml_engine(shape, type, layout == "head-major"));
                }
            }
        }
        return engines;
    }

    static ggml_type ggml_cache_type(const std::string& name) {
        for (int i = 0; i < GGML_TYPE_COUNT; ++i) {
            const char* known = ggml_type_name(static_cast<ggml_type>(i));
            if (known != nullptr && name == known) {
                return static_cast<ggml_type>(i);
            }
        }
        throw llm::Error(fmt::format("this ggml has no cache type {}; leave it out of --kv", name));
    }

    // All engines are in memory at once: an upper bound from fp16's bytes.
    void check_memory(const AttentionShape& shape) const {
        const int64_t layer = 4 * shape.context * shape.kv_heads * shape.head_dim;
        const auto engines = static_cast<int64_t>(caches_.size() * (1 + layouts_.size()));
        const int64_t needed = engines * (layer + shape.cold_bytes) + shape.cold_bytes;
        const llm::FreeMemory memory = llm::free_memory();
        if (memory.bytes >= 0 && needed > memory.bytes) {
            throw llm::Error(
                fmt::format("--context {}: the caches to compare need up to {}, {} leaves {}; use a shorter "
                            "one, a smaller --cold or fewer --kv",
                            shape.context, llm::format_bytes(needed), memory.source, llm::format_bytes(memory.bytes)));
        }
    }

    void measure(const AttentionShape& shape, PureRead& read) {
        const std::vector<std::unique_ptr<AttentionEngine>> engines = make_engines(shape);
        std::vector<Measured> measured(engines.size());
        const double pairs = static_cast<double>(shape.heads()) * static_cast<double>(shape.context) *
                             static_cast<double>(shape.queries);
        const auto step =
            progress(fmt::format("head size {}, {} KV heads, group {}, context {}, {} threads", shape.head_dim,
                                 shape.kv_heads, shape.group, shape.context, shape.threads));
        const auto steps = static_cast<double>(flags_.bench.rounds) * static_cast<double>(engines.size());
        double done = 0;
        for (int round = -1; round < flags_.bench.rounds; ++round) { // the first one warms up
            const double bandwidth = read.bytes_per_second();
            for (size_t i = 0; i < engines.size(); ++i) {
                if (interrupt_flag().load()) {
                    throw llm::Error("stopped by Ctrl-C");
                }
                measured[i].engine = engines[i].get();
                const double seconds = seconds_of(*engines[i], round < 0);
                if (round < 0) {
                    continue;
                }
                const auto bytes = static_cast<double>(engines[i]->bytes);
                measured[i].ns.push_back(seconds * 1e9 / pairs / static_cast<double>(engines[i]->layers));
                measured[i].gb.push_back(bytes / seconds * 1e-9);
                measured[i].ratio.push_back(seconds * bandwidth / bytes);
                ++done;
                if (step) { // stderr is a terminal
                    step(done / steps);
                }
            }
        }
        for (const Measured& one : measured) {
            add_row(shape, one);
        }
    }

    // Of one pass, from as many as it takes.
    double seconds_of(AttentionEngine& engine, bool once) const {
        const auto start = Clock::now();
        double seconds = 0;
        int passes = 0;
        do {
            engine.pass();
            ++passes;
            seconds = std::chrono::duration<double>(Clock::now() - start).count();
        } while (!once && seconds * 1000 < flags_.least_ms);
        return seconds / passes;
    }

    void add_row(const AttentionShape& shape, const Measured& one) {
        const Spread ns = spread_of(one.ns);
        const double gb = spread_of(one.gb).median;
        const double ratio = spread_of(one.ratio).median;
        const double gflops = 4.0 * shape.head_dim / ns.median;
        const AttentionEngine& engine = *one.engine;
        objects_.push_back({{"engine", engine.name},
                            {"layout", engine.layout},
                            {"isa", engine.isa.empty() ? Json() : Json(engine.isa)},
                            {"head_dim", shape.head_dim},
                            {"kv_heads", shape.kv_heads},
                            {"group", shape.group},
                            {"context", shape.context},
                            {"queries", shape.queries},
                            {"threads", shape.threads},
                            {"kv", engine.kv},
                            {"conditioned", shape.conditioned && engine.name == "turboquant"},
                            {"mask", shape.mask},
                            {"layers", engine.layers},
                            {"bytes", engine.bytes / engine.layers},
                            {"rounds", flags_.bench.rounds},
                            {"ns_per_head_token", ns.median},
                            {"spread", ns.interquartile},
                            {"gb_per_s", gb},
                            {"read_ratio", ratio},
                            {"gflop_per_s", gflops}});
        std::vector<std::string> row = {engine.name,
                                        engine.kv,
                                        engine.layout,
                                        engine.isa.empty() ? "-" : engine.isa,
                                        std::to_string(shape.head_dim),
                                        fmt::format("{}/{}", shape.heads(), shape.kv_heads),
                                        std::to_string(shape.context)};
        if (many_queries()) {
            row.push_back(std::to_string(shape.queries));
        }
        row.insert(row.end(), {std::to_string(shape.threads), fmt::format("{:.3g}", ns.median),
                               fmt::format("{:.1f} %", 100 * ns.interquartile), fmt::format("{:.2f}", gb),
                               fmt::format("{:.2f}", ratio)});
        if (many_queries()) {
            row.push_back(fmt::format("{:.1f}", gflops));
        }
        table_.push_back(row);
    }

    bool many_queries() const { return queries_.size() > 1 || queries_.front() > 1; }

    void print() const {
        std::vector<std::string> titles = {"engine", "cache", "layout", "isa", "head size", "heads", "context"};
        if (many_queries()) {
            titles.push_back("queries");
        }
        titles.insert(titles.end(), {"threads", "ns/(head, token)", "spread", "GB/s", "x read"});
        if (many_queries()) {
            titles.push_back("GFLOP/s");
        }
        std::vector<std::vector<std::string>> table = {titles};
        table.insert(table.end(), table_.begin(), table_.end());
        print_results(flags_.bench, objects_, table, 4);
    }

    AttentionFlags flags_;
    std::vector<int64_t> head_dims_;
    std::vector<int64_t> kv_heads_;
    std::vector<int64_t> groups_;
    std::vector<int64_t> contexts_;
    std::vector<int64_t> queries_;
    std::vector<int64_t> threads_;
    std::vector<Isa> isas_;
    std::vector<std::string> engines_;
    std::vector<std::string> layouts_;
    std::vector<llm::KvChoice> caches_;
    int64_t cold_ = 0;
    std::vector<AttentionShape> shapes_;
    std::vector<Json> objects_;
    std::vector<std::vector<std::string>> table_;
};

} // namespace

Command add_bench_attention(CLI::App& bench) {
    CLI::App* command = bench.add_subcommand("attention", "ns per query head and cached token, beside ggml's kernels");
    auto flags = std::make_shared<AttentionFlags>();
    command
        ->add_option("--kv", flags->kv,
                     "caches: bits K/V such as 4/4, f16 (ours and ggml's), q8_0 q5_1 q5_0 q4_0 (ggml's) (default "
                     "4/4,f16,q8_0,q4_0)")
        ->type_name("LIST");
    command->add_option("--head-dim", flags->head_dim, "head sizes (default 128)")->type_name("LIST");
    command->add_option("--kv-heads", flags->kv_heads, "KV heads (default 8)")->type_name("LIST");
    command->add_option("--group", flags->group, "query heads for each KV head (default 4)")->type_name("LIST");
    command->add_option("-c,--context", flags->context, "cached tokens (default 32768)")->type_name("LIST");
    command->add_option("--queries", flags->queries, "query tokens: 1 for decoding, hundreds for a prompt (default 1)")
        ->type_name("LIST");
    command->add_option("--isa", flags->isa, "instruction sets of our kernels, or all (default: the best)")
        ->type_name("LIST");
    command->add_option("--engine", flags->engines, "turboquant, reference (our fp16 kernel), ggml (default: all)")
        ->type_name("LIST");
    command->add_option("--layout", flags->layouts, "ggml's: token-major (llama.cpp's), head-major (default: both)")
        ->type_name("LIST");
    command->add_flag("--conditioned", flags->conditioned, "keys of ours with random means and factors");
    command->add_flag("--mask", flags->mask, "with a mask of zeros, as llama.cpp passes it");
    command
        ->add_option("--cold", flags->cold_mib,
                     "MiB that the layers of each cache take at least (default: 3 last-level caches)")
        ->type_name("MIB");
    command
        ->add_option("--least", flags->least_ms, "milliseconds that a round of an engine takes at least (default 50)")
        ->type_name("MS");
    add_bench_flags(*command, flags->bench);
    return [flags] { return AttentionRun(*flags).run(); };
}

} // namespace turboquant::app
