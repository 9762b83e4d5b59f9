// The combinations: head sizes x bits x groups x masks x rows x queries, sampled.
#include "attention_testing.h"

#include <rapidcheck.h>

namespace turboquant::attention_tests {
namespace {

constexpr int kBits[] = {2, 3, 4, 5, 6, 8};

// Every head size with every number of key bits and every number of value bits, one query and several.
TEST(AttentionCases, HeadSizesAndBits) {
    uint32_t seed = 100;
    for (const int head_size : {32, 64, 80, 96, 112, 128, 192, 256}) {
        for (int b = 0; b < 6; ++b) {
            const int other = kBits[(b + static_cast<int>(seed)) % 6];
            check_case({.head_size = head_size, .kv_heads = 1, .group = 1 + static_cast<int>(seed % 5), .key_bits = kBits[b],
                        .value_bits = other, .rows = 150, .peaky = seed % 2 == 0, .seed = seed}, available_isas(), false);
            check_case({.head_size = head_size, .kv_heads = 1, .group = 3, .key_bits = other, .value_bits = kBits[b], .rows = 90,
                        .queries = 3, .peaky = seed % 2 == 1, .seed = seed}, available_isas(), false);
            ++seed;
        }
    }
}

TEST(AttentionCases, Groups) {
    for (int group = 1; group <= 16; ++group) {
        check_case({.kv_heads = 2, .group = group, .key_bits = kBits[group % 6], .value_bits = kBits[group / 3 % 6],
                    .rows = 100, .queries = 1 + group % 2}, available_isas(), false);
    }
}

TEST(AttentionCases, RowCounts) {
    for (const int64_t rows : {1, 2, 63, 64, 65, 127, 128, 777, 2000}) {
        check_case({.group = 4, .rows = rows}, available_isas(), rows < 200);
        check_case({.group = 4, .rows = rows, .mask = Mask::none, .key_window = 8, .value_window = 8, .pins = 1},
                   available_isas(), rows < 200);
    }
}

TEST(AttentionCases, QueryCounts) {
    for (const int64_t queries : {1, 2, 3, 7, 33, 200}) {
        check_case({.kv_heads = 1, .group = 5, .rows = 260, .queries = queries}, available_isas(), false);
        check_case({.head_size = 128, .kv_heads = 1, .group = 2, .key_bits = 5, .value_bits = 3, .rows = 260, .queries = queries,
                    .mask = Mask::holes, .peaky = true}, available_isas(), false);
    }
}

// Any case at all.
rc::Gen<Case> any_case() {
    return rc::gen::exec([] {
        Case c;
        const bool mla = *rc::gen::inRange(0, 8) == 0;
        c.head_size = 4 * *rc::gen::inRange(1, 40);
        if (*rc::gen::inRange(0, 2) == 0) {
            c.head_size = *rc::gen::element(64, 80, 96, 128, 256);
        }
        c.value_head_size = *rc::gen::inRange(0, 4) == 0 ? 4 * *rc::gen::inRange(1, 40) : c.head_size;
        c.value_size = mla ? *rc::gen::inRange(1, c.head_size + 1) : 0;
        c.kv_heads = *rc::gen::inRange(1, 4);
        c.group = *rc::gen::inRange(1, 17);
        c.key_bits = *rc::gen::element(2, 3, 4, 5, 6, 8, 16, 32);
        c.value_bits = *rc::gen::element(2, 3, 4, 5, 6, 8, 16, 32);
        c.rows = *rc::gen::inRange<int64_t>(1, 300);
        c.queries = std::min<int64_t>(c.rows, *rc::gen::element<int64_t>(1, 1, 1, 2, 3, 9, 40));
        c.mask = *rc::gen::element(Mask::none, Mask::causal, Mask::holes, Mask::all_hidden, Mask::padded, Mask::biased);
        c.softcap = *rc::gen::element(0.0f, 0.0f, 20.0f);
        c.max_bias = *rc::gen::element(0.0f, 0.0f, 8.0f);
        c.sinks = *rc::gen::arbitrary<bool>();
        c.mu = *rc::gen::arbitrary<bool>();
        c.lambda = *rc::gen::arbitrary<bool>();
        c.key_window = *rc::gen::element(0, 1, 20, 100);
        c.value_window = *rc::gen::element(0, 1, 20, 100);
        c.pins = *rc::gen::element(0, 1, 4);
        c.staging = *rc::gen::arbitrary<bool>();
        c.overwrite = *rc::gen::arbitrary<bool>();
        c.peaky = *rc::gen::arbitrary<bool>();
        c.workers = *rc::gen::element(1, 1, 2, 5);
        c.seed = *rc::gen::arbitrary<uint32_t>();
        return c;
    });
}

TEST(AttentionCases, AnyCase) {
    const bool held = rc::check("attention agrees with the oracle", [] {
        const Case c = *any_case();
        const std::string wrong = run_case(c, available_isas(), true);
        RC_LOG() << wrong;
        RC_ASSERT(wrong.empty());
    });
    EXPECT_TRUE(held);
}

} // namespace
} // namespace turboquant::attention_tests
