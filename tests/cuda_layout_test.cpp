// The GPU's page layout: every bit of a tile belongs to exactly one code, and the places are what the kernels assume. And
// the tables by which it finds a code.
#include "codec/codec_tables.h"
#include "codec/kernels.h"
#include "cuda/gpu_layout.h"
#include "cuda/search_ranges.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
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
                                ++owners.at(static_cast<size_t>(byte) * 8 + static_cast<size_t>(w.bit + b));
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

// What encode.cu's find_index does, in its operations.
int found_index(const EncodeTable& table, float magnitude, float sigma) {
    const float place = std::fma(magnitude, kRangeSteps * table.range_scale / sigma, kPlaceBase);
    const auto range = static_cast<int>(std::bit_cast<uint32_t>(place) / kRangeSteps % kSearchRanges);
    const SearchRange r = search_range(table.threshold, table.n_thresholds, range);
    return static_cast<int>(r.below - kIndexBase) + (magnitude > r.threshold * sigma ? 1 : 0);
}

TEST(CudaSearch, ARangeAndOneComparisonFindTheIndex) {
    const EncodeTable& table = encode_table(4);
    ASSERT_GT(kSearchRanges - 1, 21.4F * table.range_scale); // else a large magnitude would begin again
    for (const float sigma : {0x1p-30F, 0.0123F, 1.0F, 3.7F, 0x1p30F}) {
        std::vector<float> magnitudes = {0};
        for (int i = 1; i < 20000; ++i) { // to beyond the largest
            magnitudes.push_back(static_cast<float>(i) * 21.4F / 20000 * sigma);
        }
        for (int k = 0; k < table.n_thresholds; ++k) {
            const float edge = table.threshold[k] * sigma;
            magnitudes.insert(magnitudes.end(), {std::nextafter(edge, 0.0F), edge, std::nextafter(edge, 2 * edge)});
        }
        for (const float m : magnitudes) {
            int expected = 0;
            for (int k = 0; k < table.n_thresholds; ++k) {
                expected += m > table.threshold[k] * sigma ? 1 : 0;
            }
            ASSERT_EQ(found_index(table, m, sigma), expected) << m << " sigma " << sigma;
        }
    }
}

TEST(CudaSearch, NoRangeHoldsTwoThresholds) { // nor does one lie where rounding could put it beside its range
    for (const int bits : {3, 4}) {
        const EncodeTable& table = encode_table(bits);
        for (int k = 0; k < table.n_thresholds; ++k) {
            const float place = table.threshold[k] * table.range_scale;
            EXPECT_GT(place, static_cast<float>(k + 1) - 0.4F) << bits << " bits, threshold " << k;
            if (k + 1 < table.n_thresholds) { // the last range has no end
                EXPECT_LT(place, static_cast<float>(k + 1) + 0.4F) << bits << " bits, threshold " << k;
            }
            EXPECT_EQ(table.range_threshold[k + 1], table.threshold[k]);
        }
    }
}

} // namespace
} // namespace turboquant::cuda
