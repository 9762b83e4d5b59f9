// Attention on cases that nobody thought of.
#include "attention_testing.h"

#include <rapidcheck.h>

namespace turboquant::attention_tests {
namespace {

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
        // At least half of the key's channels: a few channels of a vector that was rotated as a whole are judged by rounding
        // errors of all of it.
        c.value_size = mla ? *rc::gen::inRange((c.head_size + 1) / 2, c.head_size + 1) : 0;
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

TEST(AttentionProperty, AgreesWithTheOracleOnAnyCase) {
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
