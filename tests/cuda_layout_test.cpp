// The GPU's page layout: every bit of a tile belongs to exactly one code, and the places are what the kernels assume.
#include "cuda/gpu_layout.h"

#include <gtest/gtest.h>

#include <set>
#include <vector>

namespace turboquant::cuda {
namespace {

int plane_widths(int bits, int (&widths)[2]) {
    widths[0] = low_width(bits);
    widths[1] = 1;
    return bits == 3 ? 2 : 1;
}

TEST(CudaLayout, EveryBitOfASideBelongsToOneCode) {
    for (const int head_size : {64, 128, 256}) {
        for (const int bits : {2, 3, 4, 8}) {
            for (const bool key : {true, false}) {
                std::vector<int> owners(static_cast<size_t>(side_bytes(head_size, bits)) * 8);
                int widths[2];
                const int planes = plane_widths(bits, widths);
                for (int token = 0; token < kTileTokens; ++token) {
                    for (int channel = 0; channel < head_size; ++channel) {
                        const CodePlace at = key ? key_place(head_size, token, channel) : value_place(token, channel);
                        ASSERT_GE(at.lane, 0);
                        ASSERT_LT(at.lane, kLanes);
                        ASSERT_LT(at.group, head_size / 8);
                        for (int p = 0; p < planes; ++p) {
                            const WordPlace w = word_place(widths[p], at.group, at.element);
                            const int byte = (p == 0 ? 0 : plane_bytes(head_size, widths[0])) +
                                             word_offset(head_size, widths[p], at.lane, w.word);
                            for (int b = 0; b < widths[p]; ++b) {
                                ++owners.at(static_cast<size_t>(byte * 8 + w.bit + b));
                            }
                        }
                    }
                }
                for (const int n : owners) {
                    ASSERT_EQ(n, 1) << "head size " << head_size << " bits " << bits << " key " << key;
                }
            }
        }
    }
}

TEST(CudaLayout, KeysOfFourBitsShareNoWord) { // what lets a reader see whole rows while others are written
    std::set<std::pair<int, int>> words[kTileTokens];
    for (int token = 0; token < kTileTokens; ++token) {
        for (int channel = 0; channel < 128; ++channel) {
            const CodePlace at = key_place(128, token, channel);
            words[token].insert({at.lane, word_place(4, at.group, at.element).word});
        }
    }
    for (int i = 0; i < kTileTokens; ++i) {
        EXPECT_EQ(words[i].size(), 16U);
        for (int j = 0; j < i; ++j) {
            for (const auto& w : words[i]) {
                EXPECT_EQ(words[j].count(w), 0U);
            }
        }
    }
}

TEST(CudaLayout, ScalesOfATileDoNotOverlap) {
    std::set<int> at;
    for (int token = 0; token < kTileTokens; ++token) {
        at.insert(scale_index(token));
        at.insert(scale_index(token) + 2);
    }
    EXPECT_EQ(at.size(), 2U * kTileTokens);
    EXPECT_EQ(*at.rbegin(), 2 * kTileTokens - 1);
}

} // namespace
} // namespace turboquant::cuda
