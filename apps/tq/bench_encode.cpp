// tq bench encode: what it costs to encode a head vector, alone and as part of writing a row to the store.
#include "bench.h"
#include "bench_engines.h"
#include "options.h"
#include "terminal.h"

#include "llm/error.h"
#include "llm/log.h"

#include <turboquant/codec.h>
#include <turboquant/store.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <random>

#include <fmt/format.h>

namespace turboquant::app {
namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

struct EncodeFlags {
    BenchFlags bench;
    std::string bits = "2,3,4,5,6,8";
    std::string head_dim = "128";
    std::string side = "key";
    std::string isa;
    int kv_heads = 8;
    int least_ms = 20;
};

void check(const Status& status) {
    if (!status.ok()) {
        throw llm::Error(status.message());
    }
}

struct Case {
    int bits = 0;
    int head_dim = 0;
    Side side = Side::key;
    Isa isa = Isa::portable;
    bool store = false; // the store uses this instruction set
    std::vector<double> encode;
    std::vector<double> write; // a row of all heads, one at a time, as in decoding
    std::vector<double> batch; // 512 at a time, as in reading a prompt
};

class EncodeRun {
public:
    explicit EncodeRun(const EncodeFlags& flags) : flags_(flags) {
        check_flags(flags.bench);
        if (!flags.bench.threads.empty()) {
            throw llm::UsageError("--threads: encode measures one thread; leave it out");
        }
        const std::vector<int64_t> bits = parse_numbers("--bits", flags.bits, 2, 8);
        const std::vector<int64_t> sizes = parse_numbers("--head-dim", flags.head_dim, 4, 1024);
        check_range("--kv-heads", flags.kv_heads, 1, 1024);
        if (flags.least_ms < 1 || flags.least_ms > 60000) {
            throw llm::UsageError(
                fmt::format("--least {}: use a number of milliseconds from 1 to 60000", flags.least_ms));
        }
        if (flags.side != "key" && flags.side != "value") {
            throw llm::UsageError(fmt::format("--side {}: use key or value", flags.side));
        }
        const std::vector<Isa> isas = choose_isas(flags.isa);
        Isa own = Isa::portable;
        check(default_isa(own));
        for (const int64_t size : sizes) {
            if (size % 4 != 0) {
                throw llm::UsageError(fmt::format("--head-dim {}: use a multiple of 4", size));
            }
            for (const int64_t b : bits) {
                if (find_codebook(static_cast<int>(b)) == nullptr) {
                    throw llm::UsageError(fmt::format("--bits {}: use 2, 3, 4, 5, 6 or 8", b));
                }
                for (const Isa isa : isas) {
                    Case one;
                    one.bits = static_cast<int>(b);
                    one.head_dim = static_cast<int>(size);
                    one.side = flags.side == "key" ? Side::key : Side::value;
                    one.isa = isa;
                    one.store = isa == own;
                    cases_.push_back(one);
                }
            }
        }
        llm::install_log(flags.bench.verbose);
        catch_interrupts();
    }

    int run() {
        print_note(machine_words());
        const auto step = progress("encoding");
        const auto steps = static_cast<double>(cases_.size()) * flags_.bench.rounds;
        double done = 0;
        for (int round = 0; round < flags_.bench.rounds; ++round) {
            for (Case& one : cases_) {
                if (interrupt_flag().load()) {
                    throw llm::Error("stopped by Ctrl-C");
                }
                one.encode.push_back(encode(one));
                if (one.store) {
                    one.write.push_back(write(one, 1));
                    one.batch.push_back(write(one, 512));
                }
                ++done;
                if (step) { // stderr is a terminal
                    step(done / steps);
                }
            }
        }
        print();
        return 0;
    }

private:
    static constexpr int64_t kRows = 4096; // of the store; vectors of a round

    std::vector<float> numbers(size_t n) {
        std::mt19937 random(7);
        std::normal_distribution<float> normal;
        std::vector<float> x(n);
        std::generate(x.begin(), x.end(), [&] { return normal(random); });
        return x;
    }

    // Seconds of a call of body(), from as many as it takes.
    template <class Body>
    double seconds_of(const Body& body) const {
        body(); // warms up
        const auto start = Clock::now();
        double seconds = 0;
        int64_t calls = 0;
        do {
            body();
            ++calls;
            seconds = std::chrono::duration<double>(Clock::now() - start).count();
        } while (seconds * 1000 < flags_.least_ms);
        return seconds / static_cast<double>(calls);
    }

    // ns a head vector: rotation and codes.
    double encode(const Case& one) {
        constexpr size_t kVectors = 64;
        Rotation rotation;
        check(Rotation::create(one.head_dim, rotation));
        const Codebook& book = *find_codebook(one.bits);
        const ScaleRule rule = one.side == Side::key ? ScaleRule::unbiased : ScaleRule::matched;
        const auto size = static_cast<size_t>(one.head_dim);
        const std::vector<float> x = numbers(kVectors * size);
        std::vector<float> y(size);
        std::vector<uint8_t> codes(size);
        uint16_t scale = 0;
        const double seconds = seconds_of([&] {
            for (size_t i = 0; i < kVectors; ++i) {
                rotation.forward(x.data() + i * size, y.data());
                for (const RotationBlock& block : rotation.blocks()) {
                    encode_block(y.data() + block.offset, block.size, book, rule, codes.data() + block.offset, &scale,
                                 one.isa);
                }
            }
        });
        return seconds * 1e9 / kVectors;
    }

    // ns a head vector of rows written to a store, `batch` rows a call.
    double write(const Case& one, int64_t batch) {
        std::unique_ptr<Store> store;
        StoreOptions options;
        options.bits = one.bits;
        check(Store::create({one.side, one.head_dim, flags_.kv_heads, kRows}, options, {}, store));
        const int64_t width = store->shape().row_elements();
        const int64_t n = std::max<int64_t>(batch, 64);
        const std::vector<float> x = numbers(static_cast<size_t>(n * width));
        std::vector<int64_t> index(static_cast<size_t>(batch));
        int64_t row = 0;
        const double seconds = seconds_of([&] {
            for (int64_t i = 0; i < n; i += batch) {
                for (int64_t& at : index) {
                    at = row;
                    row = (row + 1) % kRows;
                }
                check(store->write(x.data() + i * width, width, index.data(), batch, {}, nullptr));
            }
        });
        return seconds * 1e9 / static_cast<double>(n * flags_.kv_heads);
    }

    void print() const {
        std::vector<Json> objects;
        std::vector<std::vector<std::string>> table = {
            {"side", "isa", "head size", "bits", "encode ns", "spread", "row write ns", "spread", "batch write ns"}};
        for (const Case& one : cases_) {
            const Spread encode = spread_of(one.encode);
            const Spread write = one.store ? spread_of(one.write) : Spread();
            const Spread batch = one.store ? spread_of(one.batch) : Spread();
            objects.push_back({{"side", flags_.side},
                               {"isa", std::string(isa_name(one.isa))},
                               {"head_dim", one.head_dim},
                               {"kv_heads", flags_.kv_heads},
                               {"bits", one.bits},
                               {"rounds", flags_.bench.rounds},
                               {"encode_ns", encode.median},
                               {"encode_spread", encode.interquartile},
                               {"write_ns", one.store ? Json(write.median) : Json()},
                               {"write_spread", one.store ? Json(write.interquartile) : Json()},
                               {"batch_write_ns", one.store ? Json(batch.median) : Json()}});
            table.push_back({flags_.side, std::string(isa_name(one.isa)), std::to_string(one.head_dim),
                             std::to_string(one.bits), fmt::format("{:.1f}", encode.median),
                             fmt::format("{:.1f} %", 100 * encode.interquartile),
                             one.store ? fmt::format("{:.1f}", write.median) : "-",
                             one.store ? fmt::format("{:.1f} %", 100 * write.interquartile) : "-",
                             one.store ? fmt::format("{:.1f}", batch.median) : "-"});
        }
        print_results(flags_.bench, objects, table, 2);
    }

    EncodeFlags flags_;
    std::vector<Case> cases_;
};

} // namespace

Command add_bench_encode(CLI::App& bench) {
    CLI::App* command = bench.add_subcommand("encode", "ns per head vector: encoding alone, and with the row's write");
    auto flags = std::make_shared<EncodeFlags>();
    command->add_option("--bits", flags->bits, "bits a value (default 2,3,4,5,6,8)")->type_name("LIST");
    command->add_option("--head-dim", flags->head_dim, "head sizes (default 128)")->type_name("LIST");
    command->add_option("--side", flags->side, "key or value (default key)")->type_name("SIDE");
    command->add_option("--kv-heads", flags->kv_heads, "KV heads of the rows written (default 8)")->type_name("N");
    command
        ->add_option("--isa", flags->isa,
                     "instruction sets of encoding alone, or all (default: the best; rows are written with that or "
                     "TURBOQUANT_ISA)")
        ->type_name("LIST");
    command->add_option("--least", flags->least_ms, "milliseconds that a measurement takes at least (default 20)")
        ->type_name("MS");
    add_bench_flags(*command, flags->bench);
    return [flags] { return EncodeRun(*flags).run(); };
}

} // namespace turboquant::app
