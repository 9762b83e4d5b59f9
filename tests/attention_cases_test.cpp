// The combinations: head sizes x bits x groups x masks x rows x queries, sampled.
#include "attention_testing.h"

namespace turboquant::attention_tests {
namespace {

constexpr int kBits[] = {2, 3, 4, 5, 6, 8};

// Every head size with every number of key bits and every number of value bits, one query and several.
TEST(AttentionCases, HeadSizesAndBits) {
    uint32_t seed = 100;
    for (const int head_size : {32, 64, 80, 96, 112, 128, 192, 256}) {
        for (int b = 0; b < 6; ++b) {
            const int other = kBits[(b + static_cast<int>(seed)) % 6];
            check_case({.head_size = head_size,
                        .kv_heads = 1,
                        .group = 1 + static_cast<int>(seed % 5),
                        .key_bits = kBits[b],
                        .value_bits = other,
                        .rows = 150,
                        .peaky = seed % 2 == 0,
                        .seed = seed},
                       available_isas(), false);
            check_case({.head_size = head_size,
                        .kv_heads = 1,
                        .group = 3,
                        .key_bits = other,
                        .value_bits = kBits[b],
                        .rows = 90,
                        .queries = 3,
                        .peaky = seed % 2 == 1,
                        .seed = seed},
                       available_isas(), false);
            ++seed;
        }
    }
}

TEST(AttentionCases, Groups) {
    for (int group = 1; group <= 16; ++group) {
        check_case({.kv_heads = 2,
                    .group = group,
                    .key_bits = kBits[group % 6],
                    .value_bits = kBits[group / 3 % 6],
                    .rows = 100,
                    .queries = 1 + group % 2},
                   available_isas(), false);
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
        check_case({.head_size = 128,
                    .kv_heads = 1,
                    .group = 2,
                    .key_bits = 5,
                    .value_bits = 3,
                    .rows = 260,
                    .queries = queries,
                    .mask = Mask::holes,
                    .peaky = true},
                   available_isas(), false);
    }
}

} // namespace
} // namespace turboquant::attention_tests
