// The parts of tq that need no model: the --kv grammar, UTF-8 in pieces, libllama's log, free memory.
#include "llm/error.h"
#include "llm/kv_choice.h"
#include "llm/log_lines.h"
#include "llm/sysinfo.h"
#include "llm/utf8.h"

#include <filesystem>
#include <fstream>
#include <string>

#include <gtest/gtest.h>
#include <unistd.h>

namespace {

using namespace turboquant::llm;

// ---- --kv --------------------------------------------------------------------------------------------------------

KvFlags with_kv(const char* kv) {
    KvFlags flags;
    flags.kv = kv;
    return flags;
}

std::string usage_error(const KvFlags& flags) {
    try {
        resolve_kv(flags);
    } catch (const UsageError& error) {
        return error.what();
    }
    return "";
}

TEST(KvChoice, PresetsAreThoseOfTheDesign) {
    EXPECT_EQ(parse_kv("tq6").describe(), "tq6 (6/5 bits, window 32, sinks 4)");
    EXPECT_EQ(parse_kv("tq5").describe(), "tq5 (5/4 bits, window 32, sinks 4)");
    EXPECT_EQ(parse_kv("tq4").describe(), "tq4 (4/4 bits, window 32, sinks 4)");
    EXPECT_EQ(parse_kv("tq3").describe(), "tq3 (3/3 bits, window 128, sinks 4)");
    EXPECT_EQ(parse_kv("default").name, "tq4");
    for (const char* bits : {"3", "4", "5", "6"}) { // presets as plain numbers
        EXPECT_EQ(parse_kv(bits).name, std::string("tq") + bits);
        EXPECT_EQ(parse_kv(bits).describe(), parse_kv(std::string("tq") + bits).describe());
    }
    EXPECT_EQ(parse_kv("q4_0-emulated").bits(), "q4_0-emulated");
    EXPECT_FALSE(parse_kv("q4_0-emulated").pass_through());
    EXPECT_EQ(resolve_kv({}).name, "tq4");
}

TEST(KvChoice, BitsForKeysAndValues) {
    const KvChoice choice = parse_kv("8/2");
    EXPECT_TRUE(choice.turboquant());
    EXPECT_EQ(choice.key_bits, 8);
    EXPECT_EQ(choice.value_bits, 2);
    EXPECT_EQ(choice.bits(), "8/2");
    EXPECT_EQ(parse_kv("16/16").bits(), "16/16");
    for (const char* bad :
         {"7/4", "4/1", "2", "8", "44", "4/", "/4", "4/4/4", "4 /4", "-4/4", "4/4x", "44/4", "99999999999/4"}) {
        EXPECT_THROW(parse_kv(bad), UsageError) << bad;
    }
}

TEST(KvChoice, HostTypes) {
    for (const char* type : {"f16", "q8_0", "q5_1", "q5_0", "q4_0"}) {
        EXPECT_FALSE(parse_kv(type).turboquant()) << type;
        EXPECT_EQ(parse_kv(type).host_type, type);
    }
    for (const char* bad : {"", "f32", "Q8_0", "q8_0 ", "tq7", "none", "tq4,tq3"}) {
        EXPECT_THROW(parse_kv(bad), UsageError) << bad;
    }
}

TEST(KvChoice, FlagsChangeThePreset) {
    KvFlags flags = with_kv("tq3");
    flags.key_bits = 5;
    EXPECT_EQ(resolve_kv(flags).describe(), "5/3 (window 128, sinks 4)");
    flags.window = 0;
    flags.sinks = 7;
    EXPECT_EQ(resolve_kv(flags).describe(), "5/3 (window 0, sinks 7)");
}

TEST(KvChoice, ContradictionsAreNamed) {
    KvFlags flags = with_kv("tq4");
    flags.no_turboquant = true;
    EXPECT_NE(usage_error(flags).find("--no-turboquant"), std::string::npos);
    flags = with_kv("q8_0");
    flags.no_turboquant = true;
    EXPECT_EQ(resolve_kv(flags).host_type, "q8_0");
    flags = {};
    flags.no_turboquant = true;
    EXPECT_EQ(resolve_kv(flags).host_type, "f16");
    flags.window = 32;
    EXPECT_NE(usage_error(flags).find("--window"), std::string::npos);
    flags = with_kv("f16");
    flags.key_bits = 4;
    EXPECT_NE(usage_error(flags).find("--key-bits"), std::string::npos);
    flags = {};
    flags.key_bits = 7;
    EXPECT_NE(usage_error(flags).find("--key-bits 7"), std::string::npos);
    flags = {};
    flags.value_bits = 16;
    EXPECT_NE(usage_error(flags).find("--value-bits 16"), std::string::npos);
    flags = {};
    flags.window = -1;
    EXPECT_NE(usage_error(flags).find("--window -1"), std::string::npos);
}

// ---- UTF-8 -------------------------------------------------------------------------------------------------------

TEST(Utf8Stream, NeverGivesOutHalfACharacter) {
    const std::string text = "a\xC3\xA4\xE2\x82\xAC\xF0\x9F\x98\x80z";
    for (size_t cut = 0; cut <= text.size(); ++cut) {
        Utf8Stream stream;
        const std::string first = stream.push(text.substr(0, cut));
        EXPECT_EQ(first_invalid_utf8(first), std::string::npos) << cut;
        const std::string second = stream.push(text.substr(cut));
        EXPECT_EQ(stream.finish(), "") << cut;
        EXPECT_EQ(first + second, text) << cut;
    }
    Utf8Stream bytewise;
    std::string out;
    for (const char byte : text) {
        out += bytewise.push(std::string(1, byte));
        EXPECT_EQ(first_invalid_utf8(out), std::string::npos);
    }
    EXPECT_EQ(out, text);
}

TEST(Utf8Stream, ReplacesWhatCannotBecomeACharacter) {
    const std::string mark = "\xEF\xBF\xBD";
    Utf8Stream stream;
    EXPECT_EQ(stream.push("a\xFFz"), "a" + mark + "z");
    EXPECT_EQ(stream.push("\xC3"), "");
    EXPECT_EQ(stream.push("z"), mark + "z");
    EXPECT_EQ(stream.push("\xE2\x82"), "");
    EXPECT_EQ(stream.finish(), mark);
    EXPECT_EQ(stream.finish(), "");
}

TEST(Utf8, FindsTheFirstBadByte) {
    EXPECT_EQ(first_invalid_utf8(""), std::string::npos);
    EXPECT_EQ(first_invalid_utf8("Z\xC3\xBCrich"), std::string::npos);
    EXPECT_EQ(first_invalid_utf8("ab\xFF"), 2U);
    EXPECT_EQ(first_invalid_utf8("\xC0\xAF"), 0U);             // overlong
    EXPECT_EQ(first_invalid_utf8("x\xED\xA0\x80"), 1U);        // surrogate
    EXPECT_EQ(first_invalid_utf8("\xF4\x90\x80\x80"), 0U);     // above U+10FFFF
    EXPECT_EQ(first_invalid_utf8("ab\xE2\x82"), 2U);           // cut off
    EXPECT_EQ(first_invalid_utf8(std::string("a\0b", 3)), 1U); // no prompt can hold it
}

// ---- libllama's log ----------------------------------------------------------------------------------------------

TEST(MemoryLog, PlainModel) {
    const LoggedMemory memory = read_memory_log({
        {LogLevel::debug, "llama_kv_cache: layer   0: dev = CPU"},
        {LogLevel::debug, "llama_kv_cache: layer   1: dev = CPU"},
        {LogLevel::info, "llama_kv_cache: TurboQuant KV buffer size =    49.75 MiB"},
        {LogLevel::info,
         "llama_kv_cache: size =  180.00 MiB (  8192 cells,   2 layers,  1/1 seqs), K (f16):   90.00 MiB, "
         "V (q8_0):   47.81 MiB"},
        {LogLevel::info, "sched_reserve:        CPU compute buffer size =    98.25 MiB"},
    });
    ASSERT_EQ(memory.caches.size(), 1U);
    EXPECT_FALSE(memory.caches[0].sliding);
    EXPECT_EQ(memory.caches[0].cells, 8192);
    EXPECT_EQ(memory.caches[0].layers, (std::vector<int>{0, 1}));
    EXPECT_EQ(memory.caches[0].key_type, "f16");
    EXPECT_EQ(memory.caches[0].value_type, "q8_0");
    EXPECT_DOUBLE_EQ(memory.caches[0].key_mib, 90);
    EXPECT_DOUBLE_EQ(memory.caches[0].value_mib, 47.81);
    EXPECT_DOUBLE_EQ(memory.kv_buffer_mib, 49.75);
    EXPECT_DOUBLE_EQ(memory.compute_mib, 98.25);
}

TEST(MemoryLog, SlidingAndRecurrentLayers) {
    const LoggedMemory memory = read_memory_log({
        {LogLevel::info, "llama_kv_cache_iswa: creating non-SWA KV cache, size = 8192 cells"},
        {LogLevel::debug, "llama_kv_cache: layer   0: filtered"},
        {LogLevel::debug, "llama_kv_cache: layer   1: dev = CPU"},
        {LogLevel::info, "llama_kv_cache:        CPU KV buffer size =    12.00 MiB"},
        {LogLevel::info,
         "llama_kv_cache: size =   12.00 MiB (  8192 cells,   1 layers,  1/1 seqs), K (f16):    6.00 MiB, "
         "V (f16):    6.00 MiB"},
        {LogLevel::info, "llama_kv_cache_iswa: creating     SWA KV cache, size = 1024 cells"},
        {LogLevel::debug, "llama_kv_cache: layer   0: dev = CPU"},
        {LogLevel::debug, "llama_kv_cache: layer   1: filtered"},
        {LogLevel::info, "llama_kv_cache:        CPU KV buffer size =     2.50 MiB"},
        {LogLevel::info,
         "llama_kv_cache: size =    2.50 MiB (  1024 cells,   1 layers,  1/1 seqs), K (f16):    1.25 MiB, "
         "V (f16):    1.25 MiB"},
        {LogLevel::debug, "llama_memory_recurrent, layer   2: dev = CPU"},
        {LogLevel::info, "llama_memory_recurrent:        CPU RS buffer size =     0.75 MiB"},
        {LogLevel::info, "llama_memory_recurrent: size =    0.75 MiB (     1 cells,   3 layers,  1 seqs  0 rs_seq), R "
                         "(f32):    0.25 MiB, S (f32):    0.50 MiB, P (f32):    0.00 MiB"},
    });
    ASSERT_EQ(memory.caches.size(), 2U);
    EXPECT_FALSE(memory.caches[0].sliding);
    EXPECT_EQ(memory.caches[0].layers, std::vector<int>{1});
    EXPECT_TRUE(memory.caches[1].sliding);
    EXPECT_EQ(memory.caches[1].layers, std::vector<int>{0});
    EXPECT_EQ(memory.caches[1].cells, 1024);
    EXPECT_DOUBLE_EQ(memory.kv_buffer_mib, 14.5);
    EXPECT_EQ(memory.recurrent_layers, std::vector<int>{2});
    EXPECT_DOUBLE_EQ(memory.recurrent_mib, 0.75);
}

TEST(MemoryLog, OtherLinesMeanNothing) {
    const LoggedMemory memory = read_memory_log({{LogLevel::info, ""},
                                                 {LogLevel::info, "KV buffer size = many"},
                                                 {LogLevel::info, "llama_kv_cache: size = ( cells, )"},
                                                 {LogLevel::info, "llama_kv_cache: dev = CPU"}});
    EXPECT_TRUE(memory.caches.empty());
    EXPECT_EQ(memory.kv_buffer_mib, 0);
}

TEST(FailureReason, PrefersThePluginThenTheFirstError) {
    EXPECT_EQ(failure_reason({}), "");
    EXPECT_EQ(failure_reason({{LogLevel::warn, "turboquant: only a warning"}}), "");
    EXPECT_EQ(failure_reason(
                  {{LogLevel::error, "llama_model_load: error loading model: no: really"}, {LogLevel::error, "later"}}),
              "error loading model: no: really");
    EXPECT_EQ(failure_reason({{LogLevel::error, "llama_init_from_model: failed"},
                              {LogLevel::error, "turboquant: flash attention is off; use -fa on"}}),
              "turboquant: flash attention is off; use -fa on");
}

// ---- free memory -------------------------------------------------------------------------------------------------

class FreeMemoryTest : public testing::Test {
protected:
    void SetUp() override {
        root_ = std::filesystem::temp_directory_path() / ("tq_units_" + std::to_string(getpid()));
        std::filesystem::remove_all(root_);
        write("proc/meminfo", "MemTotal:  9000 kB\nMemFree: 10 kB\nMemAvailable:  8000 kB\n");
    }
    void TearDown() override { std::filesystem::remove_all(root_); }
    void write(const std::string& name, const std::string& text) const {
        std::filesystem::create_directories((root_ / name).parent_path());
        std::ofstream(root_ / name) << text;
    }
    std::filesystem::path root_;
};

TEST_F(FreeMemoryTest, MemAvailable) {
    EXPECT_EQ(free_memory(root_.string()).bytes, 8000 * 1024);
    EXPECT_EQ(free_memory(root_.string()).source, "free memory");
}

TEST_F(FreeMemoryTest, AnAncestorsLimitCountsLessItsPageCache) {
    write("proc/self/cgroup", "0::/outer/inner\n");
    write("sys/fs/cgroup/outer/inner/memory.max", "max\n");
    write("sys/fs/cgroup/outer/inner/memory.current", "500\n");
    write("sys/fs/cgroup/outer/memory.max", "1000000\n");
    write("sys/fs/cgroup/outer/memory.current", "400000\n");
    write("sys/fs/cgroup/outer/memory.stat", "anon 100000\ninactive_file 200000\nactive_file 50000\n");
    EXPECT_EQ(free_memory(root_.string()).bytes, 1000000 - (400000 - 250000));
    EXPECT_NE(free_memory(root_.string()).source, "free memory");
}

TEST_F(FreeMemoryTest, VersionOneAndALimitAboveFreeMemory) {
    write("proc/self/cgroup", "5:cpu:/x\n4:memory:/box\n");
    write("sys/fs/cgroup/memory/box/memory.limit_in_bytes", "700000\n");
    write("sys/fs/cgroup/memory/box/memory.usage_in_bytes", "100000\n");
    EXPECT_EQ(free_memory(root_.string()).bytes, 600000);
    write("sys/fs/cgroup/memory/box/memory.limit_in_bytes", "9223372036854771712\n");
    EXPECT_EQ(free_memory(root_.string()).bytes, 8000 * 1024);
}

TEST_F(FreeMemoryTest, UnknownIsSaid) {
    std::filesystem::remove_all(root_);
    EXPECT_LT(free_memory(root_.string()).bytes, 0);
}

TEST(Threads, AtLeastOne) {
    EXPECT_GE(default_threads(), 1);
}

} // namespace
