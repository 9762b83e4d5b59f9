// The store row by row: round trips, the ring, pins, staging, edge cases.
#include "cache/rows.h"
#include "cache/store_impl.h"
#include "store_testing.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <new>
#include <numeric>

namespace {
std::atomic<int64_t> n_allocations = 0;
}

// Counted for the test that a token's write allocates nothing. Not inlined: GCC would see free() meet new.
__attribute__((noinline)) void* operator new(size_t bytes) {
    ++n_allocations;
    if (void* p = std::malloc(bytes == 0 ? 1 : bytes)) {
        return p;
    }
    throw std::bad_alloc();
}
__attribute__((noinline)) void operator delete(void* p) noexcept {
    std::free(p);
}
__attribute__((noinline)) void operator delete(void* p, size_t) noexcept {
    std::free(p);
}

namespace turboquant {
namespace {

using testing::make_store;
using testing::normals;
using testing::read_row;
using testing::write_row;
using testing::write_rows;

std::vector<float> seeded(const Store& store, uint32_t seed) {
    return normals(static_cast<size_t>(store.shape().row_elements()), seed);
}

// Exact up to the tag: half a unit of fp16 by rounding, one by the tag in the first 64 elements.
void expect_exact(const Store& store, int64_t row, const std::vector<float>& x) {
    EXPECT_TRUE(store.is_exact(row)) << row;
    const std::vector<float> got = read_row(store, row);
    for (size_t i = 0; i < x.size(); ++i) {
        ASSERT_LE(std::abs(got[i] - x[i]), testing::half_step(x[i]) * (i < 64 ? 1.5F : 0.5F)) << row << ' ' << i;
    }
}

std::vector<int64_t> exact_rows(const Store& store) {
    std::vector<int64_t> rows;
    for (int64_t r = 0; r < store.shape().rows; ++r) {
        if (store.is_exact(r)) {
            rows.push_back(r);
        }
    }
    return rows;
}

std::vector<uint8_t> all_codes(const Store& store) {
    const Store::Impl& m = store.impl();
    std::vector<uint8_t> bytes(m.codes.data(), m.codes.data() + m.codes.size());
    bytes.insert(bytes.end(), m.scales.data(), m.scales.data() + m.scales.size());
    return bytes;
}

TEST(Store, RefusesWhatItCannotHold) {
    std::unique_ptr<Store> store;
    const StoreShape good = {Side::key, 64, 2, 100};
    const auto refused = [&store](const StoreShape& shape, const StoreOptions& options, const Conditioning& c,
                                  const char* word) {
        const Status status = Store::create(shape, options, c, store);
        EXPECT_FALSE(status.ok());
        EXPECT_NE(status.message().find(word), std::string::npos) << status.message();
        EXPECT_EQ(status.message().find('\n'), std::string::npos);
        EXPECT_EQ(store, nullptr);
    };
    refused({Side::key, 66, 2, 100}, {}, {}, "head size 66");
    refused({Side::key, 0, 2, 100}, {}, {}, "head size");
    refused({Side::key, 1028, 2, 100}, {}, {}, "1028");
    refused({Side::key, 64, 0, 100}, {}, {}, "heads");
    refused({Side::key, 64, 2, 0}, {}, {}, "rows");
    refused({Side::key, 64, 2, -5}, {}, {}, "rows");
    refused({Side::key, 64, 2, std::numeric_limits<int64_t>::max()}, {}, {}, "rows");
    refused({Side::key, 1024, 65535, int64_t{1} << 40}, {}, {}, "address space");
    refused(good, {7, 0, 0}, {}, "bits");
    refused(good, {4, -1, 0}, {}, "window");
    refused(good, {4, 0, -1}, {}, "sink");
    refused(good, {}, {std::vector<float>(3), {}}, "3 means");
    refused(good, {}, {{}, std::vector<float>(127, 1.0F)}, "127 factors");
    std::vector<float> lambda(128, 1.0F);
    for (const float bad : {0.0F, -1.0F, NAN, HUGE_VALF, 1e-40F}) {
        lambda[100] = bad;
        refused(good, {}, {{}, lambda}, "factor");
    }
    refused(good, {}, {std::vector<float>(128, NAN), {}}, "mean");
    refused({Side::value, 64, 2, 100}, {}, {{}, {}, {{0, 1, 1.0F}}}, "values");
    size_t bytes = 0;
    EXPECT_FALSE(Store::bytes({Side::key, 66, 2, 100}, {}, bytes).ok());
}

TEST(Store, BytesAreWhatItTakes) {
    for (const Side side : {Side::key, Side::value}) {
        for (const int head_size : testing::kHeadSizes) {
            for (const int bits : {2, 3, 4, 5, 6, 8, 16, 32}) {
                for (const int window : {0, 32}) {
                    const StoreShape shape = {side, head_size, 3, 1000};
                    const StoreOptions options = {bits, window, window / 8};
                    size_t planned = 0;
                    ASSERT_TRUE(Store::bytes(shape, options, planned).ok());
                    EXPECT_EQ(make_store(shape, options)->bytes(), planned)
                        << head_size << ' ' << bits << ' ' << window;
                }
            }
        }
    }
    // 4 bits and a scale at D = 128: 4.125 bits a value in codes and scales.
    const auto store = make_store({Side::key, 128, 8, 6400}, {4, 0, 0});
    EXPECT_EQ(store->impl().codes.size() + store->impl().scales.size(),
              static_cast<size_t>(6400 * 8 * 128 * 4.125 / 8));
}

TEST(Store, RoundTripsEveryShape) {
    // Least squared error a decoder could reach, times what a scale rule may add.
    const double theory[] = {0, 0, .1175, .0345, .0095, .0025, .00066, 0, 1e-4};
    for (const Side side : {Side::key, Side::value}) {
        for (const int head_size : testing::kHeadSizes) {
            for (const int bits : {2, 3, 4, 5, 6, 8, 16, 32}) {
                const auto store = make_store({side, head_size, 2, 200}, {bits, 0, 0});
                const auto elements = static_cast<size_t>(store->shape().row_elements());
                const std::vector<float> x = normals(elements * 150, 5);
                std::vector<int64_t> index(150);
                for (size_t i = 0; i < index.size(); ++i) {
                    index[i] = static_cast<int64_t>(i * 77 % 200);
                }
                ASSERT_TRUE(write_rows(*store, x, index).ok());
                double error = 0;
                for (size_t i = 0; i < index.size(); ++i) {
                    const std::vector<float> back = read_row(*store, index[i]);
                    error += testing::squared_distance(back.data(), x.data() + i * elements, elements);
                }
                error /= testing::dot(x.data(), x.data(), x.size());
                if (bits == 32) {
                    EXPECT_EQ(error, 0);
                } else if (bits == 16) {
                    EXPECT_LT(error, 1e-7);
                } else {
                    EXPECT_LT(error, theory[bits] * 1.16)
                        << head_size << ' ' << bits; // 2-bit keys: + 12 % by the unbiased scale
                    EXPECT_GT(error, theory[bits] * (bits == 8 ? 0 : 0.7)) << head_size << ' ' << bits;
                }
                for (int64_t r = 0; r < 200; ++r) {
                    EXPECT_EQ(store->is_written(r), std::find(index.begin(), index.end(), r) != index.end());
                    EXPECT_FALSE(store->is_exact(r));
                }
            }
        }
    }
}

// Rotation blocks have scales of their own: a loud first block must not drown a quiet second one.
TEST(Store, EveryBlockHasItsOwnScale) {
    for (const Side side : {Side::key, Side::value}) {
        const auto store = make_store({side, 576, 1, 64}, {4, 0, 0});
        std::vector<float> x = seeded(*store, 3);
        std::for_each(x.begin(), x.begin() + 512, [](float& v) { v *= 1000; });
        ASSERT_TRUE(write_rows(*store, x, {7}).ok());
        const std::vector<float> back = read_row(*store, 7);
        EXPECT_LT(testing::squared_distance(x.data() + 512, back.data() + 512, 64) /
                      testing::dot(x.data() + 512, x.data() + 512, 64),
                  .02);
        EXPECT_LT(testing::squared_distance(x.data(), back.data(), 512) / testing::dot(x.data(), x.data(), 512), .02);
    }
}

TEST(Store, RowsDoNotTouchTheirNeighbours) {
    for (const Side side : {Side::key, Side::value}) {
        for (const int bits : {2, 3, 4, 5, 6, 8, 16, 32}) {
            const auto store = make_store({side, 64, 2, 130}, {bits, 0, 0});
            std::vector<std::vector<float>> before;
            for (int64_t r = 0; r < 130; ++r) {
                ASSERT_TRUE(write_row(*store, r, static_cast<uint32_t>(r)).ok());
            }
            for (int64_t r = 0; r < 130; ++r) {
                before.push_back(read_row(*store, r));
            }
            for (const int64_t row : {0, 63, 64, 77, 129}) {
                ASSERT_TRUE(write_row(*store, row, static_cast<uint32_t>(1000 + row)).ok());
                EXPECT_NE(read_row(*store, row), before[static_cast<size_t>(row)]);
                before[static_cast<size_t>(row)] = read_row(*store, row);
                for (int64_t r = 0; r < 130; ++r) {
                    ASSERT_EQ(read_row(*store, r), before[static_cast<size_t>(r)])
                        << bits << ": " << row << " changed " << r;
                }
            }
        }
    }
}

TEST(Store, ZeroTinyHugeAndNonfiniteRows) {
    for (const Side side : {Side::key, Side::value}) {
        for (const int bits : {2, 3, 4, 5, 6, 8, 16, 32}) {
            const auto store = make_store({side, 64, 3, 64}, {bits, 0, 0});
            const auto write = [&store](int64_t row, float fill, size_t at, float value) {
                std::vector<float> x(192, fill);
                x[at] = value;
                EXPECT_TRUE(write_rows(*store, x, {row}).ok());
                return read_row(*store, row);
            };
            EXPECT_EQ(write(0, 0, 0, 0), std::vector<float>(192, 0.0F));
            EXPECT_EQ(write(1, 1e-42F, 0, -1e-42F)[100], bits == 32 ? 1e-42F : 0.0F);
            for (const float v : write(2, 1e-9F, 3, 1e-9F)) {
                EXPECT_LE(std::abs(v), 2e-9F);
            }
            EXPECT_EQ(store->counters().saturated, 0U);
            // Head 1 is beyond fp16, its neighbours are what they would be otherwise.
            const std::vector<float> clean = write(3, 1, 70, 1);
            std::vector<float> back = write(3, 1, 70, 1e30F);
            EXPECT_EQ(store->counters().saturated, bits == 32 ? 0U : 1U);
            for (size_t i = 0; i < 192; ++i) {
                ASSERT_TRUE(std::isfinite(back[i]));
                if (i < 64 || i >= 128) {
                    EXPECT_EQ(back[i], clean[i]) << bits << ' ' << i;
                }
            }
            EXPECT_NEAR(back[70], bits == 32 ? 1e30F : 65504.0F, bits == 32 ? 0 : 200);
            EXPECT_EQ(store->counters().nonfinite, 0U);
            for (const float bad : {HUGE_VALF, -HUGE_VALF, NAN}) {
                back = write(4, 1, 70, bad);
                for (size_t i = 0; i < 192; ++i) {
                    if (i >= 64 && i < 128) {
                        EXPECT_EQ(back[i], 0.0F);
                    } else {
                        EXPECT_EQ(back[i], clean[i]);
                    }
                }
            }
            EXPECT_EQ(store->counters().nonfinite, 3U);
            EXPECT_EQ(store->counters().rows_written, 8U);
            EXPECT_EQ(read_row(*store, 0), std::vector<float>(192, 0.0F));
        }
    }
}

TEST(Store, ExactRowsOfBadValues) {
    const auto store = make_store({Side::key, 64, 2, 64}, {4, 4, 0});
    std::vector<float> x(128, 1.0F);
    x[10] = NAN;
    x[100] = 1e9F;
    ASSERT_TRUE(write_rows(*store, x, {0}).ok());
    const std::vector<float> back = read_row(*store, 0);
    for (size_t i = 0; i < 64; ++i) {
        EXPECT_LE(back[i], 6e-8F); // zero, but for the tag
    }
    EXPECT_EQ(back[100], 65504.0F);
    EXPECT_EQ(back[101], 1.0F);
    EXPECT_EQ(store->counters().nonfinite, 1U);
    EXPECT_EQ(store->counters().saturated, 1U);
}

TEST(Store, BadWritesChangeNothing) {
    const auto store = make_store({Side::value, 64, 2, 100}, {4, 8, 2});
    ASSERT_TRUE(write_row(*store, 5, 1).ok());
    const std::vector<uint8_t> before = all_codes(*store);
    const std::vector<float> x = normals(128 * 4, 2);
    Staging staging;
    for (const std::vector<int64_t>& index : {std::vector<int64_t>{1, 2, -1}, {1, 2, 100}, {1, 2, 1}, {5, 5}}) {
        const Status status = write_rows(*store, x, index, &staging);
        EXPECT_EQ(status.code(), StatusCode::invalid_argument);
        EXPECT_EQ(staging.owner, nullptr);
    }
    const int64_t index[] = {1, 2};
    EXPECT_FALSE(store->write(nullptr, 128, index, 1, {}, nullptr).ok());
    EXPECT_FALSE(store->write(x.data(), 128, nullptr, 1, {}, nullptr).ok());
    EXPECT_FALSE(store->write(x.data(), 128, index, -1, {}, nullptr).ok());
    EXPECT_FALSE(store->write(x.data(), 127, index, 2, {}, nullptr).ok());
    EXPECT_TRUE(store->write(nullptr, 0, nullptr, 0, {}, nullptr).ok());
    EXPECT_EQ(all_codes(*store), before);
    EXPECT_EQ(exact_rows(*store), (std::vector<int64_t>{5}));
    EXPECT_EQ(store->counters().rows_written, 1U);
    ASSERT_TRUE(write_rows(*store, x, {1, 2, 3, 5}).ok()) << "marks of the refused batches must be gone";
    std::vector<float> row(128);
    for (const int64_t bad : {-1, 100}) {
        EXPECT_FALSE(store->read(bad, row.data()).ok());
        EXPECT_FALSE(store->rewrite(bad, row.data()).ok());
        EXPECT_FALSE(store->pin(bad, nullptr).ok());
        EXPECT_FALSE(store->is_exact(bad));
        EXPECT_FALSE(store->is_pinned(bad));
        EXPECT_FALSE(store->is_written(bad));
    }
    EXPECT_FALSE(store->rewrite(1, nullptr).ok());
}

// ---- conditioning ------------------------------------------------------------------------------------------------

TEST(Conditioning, OffsetAndFactorsAreUndone) {
    const size_t n = 3 * 80;
    Conditioning c;
    c.mu = normals(n, 1, 50);
    for (const float v : normals(n, 2)) {
        c.lambda.push_back(std::exp(v));
    }
    for (const Side side : {Side::key, Side::value}) {
        const auto store = make_store({side, 80, 3, 64}, {4, 0, 0}, c);
        const auto plain = make_store({side, 80, 3, 64}, {4, 0, 0});
        std::vector<float> x = normals(n, 3);
        for (size_t i = 0; i < n; ++i) { // what conditioning is for: offsets, and channels of unequal size
            x[i] = x[i] / c.lambda[i] + c.mu[i];
        }
        ASSERT_TRUE(write_rows(*store, x, {9}).ok());
        ASSERT_TRUE(write_rows(*plain, x, {9}).ok());
        const std::vector<float> with = read_row(*store, 9);
        const std::vector<float> without = read_row(*plain, 9);
        double error[2] = {};
        for (size_t i = 0; i < n; ++i) { // in lambda's measure
            error[0] += std::pow(c.lambda[i] * (with[i] - x[i]), 2);
            error[1] += std::pow(c.lambda[i] * (without[i] - x[i]), 2);
        }
        EXPECT_LT(error[0] / static_cast<double>(n), .02);
        EXPECT_GT(error[1], 20 * error[0]);
        EXPECT_EQ(read_row(*store, 8), std::vector<float>(n, 0.0F)) << "a row never written is zeros, not mu";
    }
}

TEST(Conditioning, FactorsAreWhatKernelsNeed) {
    Conditioning c;
    c.mu = normals(64, 1);
    c.lambda.assign(64, 2.0F);
    const auto store = make_store({Side::key, 64, 1, 64}, {8, 0, 0}, c);
    const std::vector<float> x = normals(64, 3);
    const std::vector<float> q = normals(64, 4);
    ASSERT_TRUE(write_rows(*store, x, {0}).ok());
    // R(lambda (x - mu)) . R(q / lambda) = (x - mu) . q
    std::vector<float> rotated(64);
    for (size_t i = 0; i < 64; ++i) {
        rotated[i] = q[i] / c.lambda[i];
    }
    store->rotation().forward(rotated.data(), rotated.data());
    double score = 0;
    for (int ch = 0; ch < 64; ++ch) {
        const FieldPosition at = field_position(Side::key, store->impl().tile.planes[0], 0, ch);
        score += static_cast<int8_t>(store->impl().tile_codes(0, 0)[at.byte]) *
                 static_cast<double>(rotated[static_cast<size_t>(ch)]);
    }
    score *= static_cast<double>(from_half(store->impl().tile_scales(0, 0)[0]));
    double expected = 0;
    for (size_t i = 0; i < 64; ++i) {
        expected += static_cast<double>(q[i]) * (static_cast<double>(x[i]) - static_cast<double>(c.mu[i]));
    }
    EXPECT_NEAR(score, expected, 0.1);
}

// ---- the ring ----------------------------------------------------------------------------------------------------

TEST(Ring, KeepsTheLatestRows) {
    const auto store = make_store({Side::key, 64, 2, 300}, {4, 8, 0});
    for (int64_t r = 0; r < 40; ++r) {
        const int64_t row = r * 7 % 300;
        ASSERT_TRUE(write_row(*store, row, static_cast<uint32_t>(r)).ok());
        std::vector<int64_t> latest;
        for (int64_t k = std::max<int64_t>(0, r - 7); k <= r; ++k) {
            latest.push_back(k * 7 % 300);
            expect_exact(*store, k * 7 % 300, seeded(*store, static_cast<uint32_t>(k)));
        }
        std::sort(latest.begin(), latest.end());
        EXPECT_EQ(exact_rows(*store), latest);
    }
    EXPECT_EQ(store->impl().clock, 40U);
}

TEST(Ring, LeavingItChangesNoCodes) {
    const auto store = make_store({Side::key, 64, 2, 300}, {4, 4, 2});
    const auto bare = make_store({Side::key, 64, 2, 300}, {4, 0, 0});
    for (int64_t r = 0; r < 30; ++r) {
        ASSERT_TRUE(write_row(*store, r, static_cast<uint32_t>(r)).ok());
        ASSERT_TRUE(write_row(*bare, r, static_cast<uint32_t>(r)).ok());
        ASSERT_EQ(all_codes(*store), all_codes(*bare));
    }
    EXPECT_EQ(read_row(*store, 3), read_row(*bare, 3));
}

TEST(Ring, BatchLongerThanTheWindow) {
    for (const int64_t n : {1, 3, 7, 8, 9, 50}) {
        const auto store = make_store({Side::value, 64, 2, 300}, {3, 8, 0});
        for (int64_t r = 100; r < 106; ++r) {
            ASSERT_TRUE(write_row(*store, r, static_cast<uint32_t>(r)).ok());
        }
        std::vector<int64_t> index(static_cast<size_t>(n));
        std::iota(index.begin(), index.end(), 200);
        const std::vector<float> x = normals(static_cast<size_t>(n) * 128, 1);
        ASSERT_TRUE(write_rows(*store, x, index).ok());
        std::vector<int64_t> expected;
        for (int64_t r = 100; r < 106; ++r) {
            if (106 - r + n <= 8) {
                expected.push_back(r);
            }
        }
        for (int64_t r = std::max<int64_t>(0, n - 8); r < n; ++r) {
            expected.push_back(200 + r);
            expect_exact(*store, 200 + r, {x.begin() + r * 128, x.begin() + (r + 1) * 128});
        }
        EXPECT_EQ(exact_rows(*store), expected) << n;
    }
}

TEST(Ring, OverwritingMakesARowYoung) {
    const auto store = make_store({Side::key, 64, 1, 64}, {4, 3, 0});
    for (const int64_t row : {0, 1, 2}) {
        ASSERT_TRUE(write_row(*store, row, static_cast<uint32_t>(row)).ok());
    }
    ASSERT_TRUE(write_row(*store, 0, 50).ok()); // now 1 is the oldest
    ASSERT_TRUE(write_row(*store, 9, 9).ok());
    EXPECT_EQ(exact_rows(*store), (std::vector<int64_t>{0, 2, 9}));
    expect_exact(*store, 0, seeded(*store, 50));
}

TEST(Ring, RewriteKeepsPlaceAgeAndPin) {
    const auto store = make_store({Side::key, 64, 1, 64}, {4, 3, 1});
    for (const int64_t row : {0, 1, 2, 3}) {
        ASSERT_TRUE(write_row(*store, row, static_cast<uint32_t>(row)).ok());
        if (row == 0) {
            ASSERT_TRUE(store->pin(0, nullptr).ok());
        }
    }
    for (const int64_t row : {0, 1, 2, 3}) {
        ASSERT_TRUE(store->rewrite(row, seeded(*store, static_cast<uint32_t>(100 + row)).data()).ok());
        expect_exact(*store, row, seeded(*store, static_cast<uint32_t>(100 + row)));
        Tag tag;
        bool damaged = true;
        std::vector<uint16_t> saved(store->native_row_bytes() / 2);
        store->read_native(row, reinterpret_cast<uint8_t*>(saved.data()));
        ASSERT_TRUE(read_tag(saved.data(), tag, damaged));
        EXPECT_EQ(tag.age, row + 1);
        EXPECT_EQ(tag.pinned, row == 0);
        EXPECT_FALSE(damaged);
    }
    EXPECT_TRUE(store->is_pinned(0));
    EXPECT_EQ(store->impl().clock, 4U);
    ASSERT_TRUE(write_row(*store, 9, 9).ok());
    EXPECT_EQ(exact_rows(*store), (std::vector<int64_t>{0, 2, 3, 9})) << "1 is still the oldest";
    // Row 1 has codes only now; so has one that was never written before.
    for (const int64_t row : {1, 40}) {
        ASSERT_TRUE(store->rewrite(row, seeded(*store, 7).data()).ok());
        EXPECT_FALSE(store->is_exact(row));
        EXPECT_TRUE(store->is_written(row));
        const auto fresh = make_store({Side::key, 64, 1, 64}, {4, 0, 0});
        ASSERT_TRUE(write_row(*fresh, row, 7).ok());
        EXPECT_EQ(read_row(*store, row), read_row(*fresh, row));
    }
}

TEST(Ring, NoneForPassThroughAndVeryShortRows) {
    for (const int bits : {16, 32}) {
        const auto store = make_store({Side::key, 64, 1, 64}, {bits, 8, 4});
        ASSERT_TRUE(write_row(*store, 0, 0).ok());
        EXPECT_FALSE(store->is_exact(0));
        EXPECT_EQ(store->options().window, 0);
        EXPECT_TRUE(store->pin(0, nullptr).ok());
        EXPECT_FALSE(store->is_pinned(0));
    }
    const auto store = make_store({Side::key, 20, 3, 64}, {4, 8, 4}); // 60 elements: no room for the tag
    ASSERT_TRUE(write_row(*store, 0, 0).ok());
    EXPECT_FALSE(store->is_exact(0));
    const auto heads = make_store({Side::key, 16, 4, 64}, {4, 8, 4}); // the tag spans four heads
    ASSERT_TRUE(write_row(*heads, 0, 0).ok());
    expect_exact(*heads, 0, seeded(*heads, 0));
}

// ---- pins --------------------------------------------------------------------------------------------------------

TEST(Pin, KeepsARowExact) {
    const auto store = make_store({Side::key, 64, 2, 300}, {4, 4, 2});
    for (int64_t r = 0; r < 30; ++r) {
        ASSERT_TRUE(write_row(*store, r, static_cast<uint32_t>(r)).ok());
        if (r < 2) {
            ASSERT_TRUE(store->pin(r, nullptr).ok());
            ASSERT_TRUE(store->pin(r, nullptr).ok()) << "again: stays as it is";
            EXPECT_TRUE(store->is_pinned(r));
        }
    }
    EXPECT_EQ(exact_rows(*store), (std::vector<int64_t>{0, 1, 26, 27, 28, 29}));
    expect_exact(*store, 0, seeded(*store, 0));
    expect_exact(*store, 1, seeded(*store, 1));
    EXPECT_FALSE(store->is_pinned(29));
    // Overwritten: no longer pinned, one of the ring.
    ASSERT_TRUE(write_row(*store, 0, 99).ok());
    EXPECT_FALSE(store->is_pinned(0));
    expect_exact(*store, 0, seeded(*store, 99));
    EXPECT_EQ(exact_rows(*store), (std::vector<int64_t>{0, 1, 27, 28, 29}));
}

TEST(Pin, LongestPinnedGivesWay) {
    const auto store = make_store({Side::key, 64, 1, 64}, {4, 8, 2});
    for (int64_t r = 0; r < 6; ++r) {
        ASSERT_TRUE(write_row(*store, r, static_cast<uint32_t>(r)).ok());
    }
    for (const int64_t row : {4, 1, 3}) {
        ASSERT_TRUE(store->pin(row, nullptr).ok());
    }
    EXPECT_FALSE(store->is_pinned(4));
    EXPECT_FALSE(store->is_exact(4)); // it fell back to its codes
    EXPECT_TRUE(store->is_pinned(1));
    EXPECT_TRUE(store->is_pinned(3));
    EXPECT_EQ(exact_rows(*store), (std::vector<int64_t>{0, 1, 2, 3, 5}));
}

TEST(Pin, ComesFromStagingWhereTheRingHasLostIt) {
    for (const int window : {0, 2, 8}) {
        const auto store = make_store({Side::key, 64, 2, 300}, {4, window, 4});
        Staging staging;
        std::vector<int64_t> index(50);
        std::iota(index.begin(), index.end(), 10);
        const std::vector<float> x = normals(50 * 128, 1);
        ASSERT_TRUE(write_rows(*store, x, index, &staging).ok());
        EXPECT_FALSE(store->pin(12, nullptr).ok());
        EXPECT_FALSE(store->pin(200, &staging).ok());
        ASSERT_TRUE(store->pin(12, &staging).ok());
        EXPECT_TRUE(store->is_pinned(12));
        expect_exact(*store, 12, {x.begin() + 2 * 128, x.begin() + 3 * 128});
        ASSERT_TRUE(store->pin(59, &staging).ok()); // the ring's, where there is one
        const auto other = make_store({Side::key, 64, 2, 300}, {4, window, 4});
        ASSERT_TRUE(write_rows(*other, x, index).ok());
        EXPECT_FALSE(other->pin(13, &staging).ok()) << "somebody else's staging";
    }
    const auto none = make_store({Side::key, 64, 2, 300}, {4, 4, 0});
    EXPECT_TRUE(none->pin(0, nullptr).ok()) << "no slots: nothing to do";
}

// ---- staging -----------------------------------------------------------------------------------------------------

TEST(Staging, HoldsTheRingThenTheBatch) {
    const auto store = make_store({Side::key, 64, 2, 300}, {4, 4, 1});
    Staging staging;
    for (const int64_t row : {0, 11, 22, 33, 44, 55}) {
        ASSERT_TRUE(write_row(*store, row, static_cast<uint32_t>(row)).ok());
        if (row == 0) {
            ASSERT_TRUE(store->pin(0, nullptr).ok());
        }
    }
    std::vector<std::vector<float>> ring;
    for (const int64_t row : {22, 33, 55}) {
        ring.push_back(read_row(*store, row));
    }
    const std::vector<int64_t> index = {44, 100, 101, 102, 103, 104}; // 44 is in the ring and overwritten
    const std::vector<float> x = normals(6 * 128, 1);
    ASSERT_TRUE(write_rows(*store, x, index, &staging).ok());
    EXPECT_EQ(staging.owner, store.get());
    EXPECT_EQ(staging.batch_begin, 3);
    EXPECT_EQ(staging.row, (std::vector<int64_t>{22, 33, 55, 44, 100, 101, 102, 103, 104}));
    EXPECT_EQ(staging.age, (std::vector<uint64_t>{3, 4, 6, 7, 8, 9, 10, 11, 12}));
    ASSERT_EQ(staging.raw.size(), 9U * 128);
    for (size_t e = 0; e < 9; ++e) {
        for (size_t i = 0; i < 128; ++i) {
            const float v = from_half(staging.raw[e * 128 + i]);
            if (e < 3) {
                ASSERT_EQ(v, ring[e][i]);
            } else {
                const float expected = x[(e - 3) * 128 + i];
                ASSERT_LE(std::abs(v - expected), testing::half_step(expected) * 1.5F);
                if (store->is_exact(staging.row[e])) { // the very values that the store has
                    ASSERT_EQ(v, read_row(*store, staging.row[e])[i]);
                }
            }
        }
    }
}

TEST(Staging, ServesStoresInTurn) {
    const auto a = make_store({Side::key, 64, 2, 300}, {4, 4, 1});
    const auto b = make_store({Side::value, 128, 3, 300}, {4, 2, 0});
    const auto none = make_store({Side::value, 64, 1, 300}, {4, 0, 0});
    Staging staging;
    ASSERT_TRUE(write_rows(
                    *a, normals(20 * 128, 1),
                    [] {
                        std::vector<int64_t> v(20);
                        std::iota(v.begin(), v.end(), 0);
                        return v;
                    }(),
                    &staging)
                    .ok());
    ASSERT_TRUE(write_row(*b, 7, 1, &staging).ok());
    EXPECT_EQ(staging.owner, b.get());
    EXPECT_EQ(staging.size(), 1);
    EXPECT_EQ(staging.raw.size(), 384U);
    ASSERT_TRUE(write_row(*none, 7, 1, &staging).ok());
    EXPECT_EQ(staging.owner, none.get());
    EXPECT_EQ(staging.size(), 0);
    EXPECT_EQ(staging.batch_begin, 0);
}

// ---- the whole store ---------------------------------------------------------------------------------------------

TEST(Store, ThreadsGiveTheSameBytes) {
    testing::ThreadPool pool;
    for (const Side side : {Side::key, Side::value}) {
        for (const int bits : {2, 3, 4, 8, 16}) {
            for (const int heads : {1, 3}) {
                const auto serial = make_store({side, 64, heads, 700}, {bits, 16, 2});
                const auto threaded = make_store({side, 64, heads, 700}, {bits, 16, 2});
                std::vector<int64_t> rows(700);
                std::iota(rows.begin(), rows.end(), 0);
                std::mt19937 generator(1);
                Staging staging[2];
                for (int batch = 0; batch < 3; ++batch) {
                    std::shuffle(rows.begin(), rows.end(), generator);
                    const std::vector<int64_t> index(rows.begin(), rows.begin() + 400);
                    std::vector<float> x = normals(400 * static_cast<size_t>(64 * heads), static_cast<uint32_t>(batch));
                    x[1000] = NAN;
                    x[5000] = 1e30F;
                    ASSERT_TRUE(write_rows(*serial, x, index, &staging[0]).ok());
                    ASSERT_TRUE(write_rows(*threaded, x, index, &staging[1], pool.parallel()).ok());
                }
                EXPECT_EQ(all_codes(*serial), all_codes(*threaded));
                EXPECT_EQ(staging[0].raw, staging[1].raw);
                EXPECT_EQ(serial->counters().nonfinite, 3U);
                EXPECT_EQ(threaded->counters().nonfinite, 3U);
                EXPECT_EQ(threaded->counters().saturated, serial->counters().saturated);
                for (int64_t r = 0; r < 700; ++r) {
                    ASSERT_EQ(read_row(*serial, r), read_row(*threaded, r));
                }
            }
        }
    }
}

TEST(Store, ClearIsLikeNew) {
    const StoreShape shape = {Side::value, 64, 2, 300};
    for (const int bits : {4, 16}) {
        const auto store = make_store(shape, {bits, 4, 2});
        for (int64_t r = 0; r < 30; ++r) {
            ASSERT_TRUE(write_row(*store, r, static_cast<uint32_t>(r)).ok());
        }
        ASSERT_TRUE(bits > 8 || store->pin(29, nullptr).ok());
        store->clear();
        EXPECT_TRUE(exact_rows(*store).empty());
        for (int64_t r = 0; r < 300; ++r) {
            ASSERT_FALSE(store->is_written(r));
            ASSERT_EQ(read_row(*store, r), std::vector<float>(128, 0.0F));
        }
        EXPECT_EQ(all_codes(*store), all_codes(*make_store(shape, {bits, 4, 2})));
        EXPECT_EQ(store->counters().rows_written, 30U);
        for (int64_t r = 0; r < 9; ++r) {
            ASSERT_TRUE(write_row(*store, r, static_cast<uint32_t>(r)).ok());
        }
        EXPECT_EQ(exact_rows(*store).size(), bits == 4 ? 4U : 0U);
    }
}

TEST(Store, CopyTakesEverything) {
    for (const int bits : {3, 16}) {
        const StoreShape shape = {Side::value, 64, 2, 300};
        const auto source = make_store(shape, {bits, 4, 2});
        const auto copy = make_store(shape, {bits, 4, 2});
        for (const int64_t row : {3, 70, 71, 200, 201, 202, 203}) {
            ASSERT_TRUE(write_row(*source, row, static_cast<uint32_t>(row)).ok());
            ASSERT_TRUE(row != 3 || source->pin(3, nullptr).ok());
        }
        for (const int64_t row : {5, 299, 130}) {
            ASSERT_TRUE(write_row(*copy, row, static_cast<uint32_t>(row)).ok());
        }
        ASSERT_TRUE(copy->copy_from(*source).ok());
        ASSERT_TRUE(copy->copy_from(*copy).ok());
        for (int round = 0; round < 2; ++round) {
            EXPECT_EQ(all_codes(*copy), all_codes(*source));
            EXPECT_EQ(exact_rows(*copy), exact_rows(*source));
            for (int64_t r = 0; r < 300; ++r) {
                ASSERT_EQ(read_row(*copy, r), read_row(*source, r));
                ASSERT_EQ(copy->is_pinned(r), source->is_pinned(r));
                ASSERT_EQ(copy->is_written(r), source->is_written(r));
            }
            // And they go on alike.
            ASSERT_TRUE(write_row(*copy, 9, 1).ok());
            ASSERT_TRUE(write_row(*source, 9, 1).ok());
        }
        EXPECT_FALSE(copy->copy_from(*make_store(shape, {bits == 3 ? 4 : 32, 4, 2})).ok());
        EXPECT_FALSE(copy->copy_from(*make_store({Side::key, 64, 2, 300}, {bits, 4, 2})).ok());
        EXPECT_FALSE(copy->copy_from(*make_store({Side::value, 64, 2, 301}, {bits, 4, 2})).ok());
        EXPECT_FALSE(copy->copy_from(*make_store(shape, {bits, 4, 2}, {std::vector<float>(128, 1.0F), {}})).ok());
    }
}

// A token's write must cost no allocation, with or without staging, but for one in every position block.
TEST(Store, SteadyStateAllocatesNothing) {
    const auto store = make_store({Side::key, 128, 8, 1000}, {4, 32, 4});
    const std::vector<float> x = normals(1024 * 16, 1);
    std::vector<int64_t> index(16);
    std::iota(index.begin(), index.end(), 0);
    std::vector<int32_t> positions(16);
    Staging staging;
    bool good = true;
    int64_t before = 0;
    for (int round = 0; round < 40; ++round) {
        if (round == 5) { // the ring is full, the staging has grown
            before = n_allocations;
        }
        for (int64_t& i : index) {
            i = (i + 16) % 1000;
        }
        std::vector<int32_t>::size_type i = 0;
        for (int32_t& p : positions) {
            p = static_cast<int32_t>(index[i++] % kPositionBlock);
        }
        good = good && store
                           ->write(x.data(), 1024, index.data(), round % 2 == 0 ? 16 : 1, {},
                                   round % 3 == 0 ? nullptr : &staging, positions.data())
                           .ok();
        good = good && store->pin(index[0], nullptr).ok();
    }
    EXPECT_EQ(n_allocations - before, 0);
    EXPECT_TRUE(good);
}

#if defined(__linux__)
size_t resident_bytes() {
    std::ifstream in("/proc/self/statm");
    size_t pages = 0;
    in >> pages >> pages;
    return pages * 4096;
}

TEST(Store, MemoryIsReservedNotTouched) {
#ifdef __SANITIZE_THREAD__
    GTEST_SKIP() << "the thread sanitizer's shadow of the pages is resident too";
#endif
    const size_t before = resident_bytes();
    const auto store = make_store({Side::key, 128, 8, 1 << 21}, {4, 0, 0}); // 1 GiB
    EXPECT_GT(store->bytes(), size_t{1} << 30);
    EXPECT_LT(resident_bytes() - before, size_t{16} << 20);
    const std::vector<float> x = normals(1024 * 1000, 1);
    std::vector<int64_t> index(1000);
    for (int block = 0; block < 60; ++block) {
        std::iota(index.begin(), index.end(), block * 1000);
        ASSERT_TRUE(write_rows(*store, x, index).ok());
    }
    EXPECT_GT(resident_bytes() - before, size_t{30} << 20);
    store->clear();
    EXPECT_LT(resident_bytes() - before, size_t{20} << 20);
}
#endif

} // namespace
} // namespace turboquant
