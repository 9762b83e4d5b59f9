// The KV cache takes the memory that the host reports, and not a byte (of those that can be measured) more.
#include "plugin_host.h"

#include <cstdio>
#include <regex>

namespace tqtest {
namespace {

constexpr int kTokens = 8192;

struct Measured {
    double reported_mib = 0; // "KV buffer size" lines, summed
    double grown_mib = 0;    // resident memory, from before the context to after its last token
};

Measured measure(const std::string& model, const std::string& host) {
    const Outcome run = run_program({environment("TQ_TEST_CHILD"), "memory", model, host, std::to_string(kTokens)},
                                    {"TQ_TEST_VERBOSE=1"}, 110);
    EXPECT_EQ(run.status, 0) << run.err;
    Measured m;
    const std::regex size("KV buffer size =\\s*([0-9.]+) MiB");
    for (std::sregex_iterator i(run.err.begin(), run.err.end(), size), end; i != end; ++i) {
        m.reported_mib += std::stod((*i)[1]);
    }
    long before = 0;
    long after = 0;
    EXPECT_EQ(std::sscanf(run.out.c_str(), "rss_before_kib %ld rss_after_kib %ld", &before, &after), 2) << run.out;
    m.grown_mib = static_cast<double>(after - before) / 1024;
    return m;
}

TEST(Memory, ReportedAndResidentAreTheCompressedSize) {
    TQ_REQUIRE_ENVIRONMENT("TQ_TEST_TINY");
    const std::string model = environment("TQ_TEST_TINY") + "/llama_memory.gguf";
    const Measured stock = measure(model, "stock");
    const Measured plugin = measure(model, "plugin");
    std::printf("%d tokens: f16 reported %.2f MiB, grew %.2f MiB; 4/4 reported %.2f MiB, grew %.2f MiB\n", kTokens,
                stock.reported_mib, stock.grown_mib, plugin.reported_mib, plugin.grown_mib);
    // 2 layers, 4 heads of 128, keys and values, 2 bytes.
    const double f16 = 2.0 * 4 * 128 * 2 * 2 * kTokens / (1 << 20);
    // 4 bits and a scale of 2 bytes for each head's 128 values; exact rows, reserved scales and the like on top.
    const double codes = f16 * (4 + 16.0 / 128) / 16;
    EXPECT_NEAR(stock.reported_mib, f16, 0.01);
    EXPECT_GE(plugin.reported_mib, codes * 0.99);
    EXPECT_LE(plugin.reported_mib, codes * 1.15 + 0.5);
    // The rest of a context is the same in both processes, but for the plug-in's scratch (4.7 to 5.1 MiB), which does not
    // grow with it.
    const double saved = stock.grown_mib - plugin.grown_mib;
    EXPECT_NEAR(saved, stock.reported_mib - plugin.reported_mib, 6);
    EXPECT_LE(plugin.grown_mib, 0.6 * stock.grown_mib);
}

} // namespace
} // namespace tqtest
