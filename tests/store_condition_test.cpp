// Store::condition(): conditioning that comes when rows are there already, and what saved rows tell of it.
#include "cache/rows.h"
#include "cache/store_impl.h"
#include "store_testing.h"

#include "turboquant/attention.h"

#include <algorithm>
#include <map>

namespace turboquant {
namespace {

using testing::make_store;
using testing::native_row;
using testing::normals;
using testing::read_row;
using testing::squared_distance;

constexpr StoreShape kShape{Side::key, 64, 2, 1024};
constexpr size_t kElements = 128;

// A large mean in pairs that turn little within a block (fast ones have no mean there), channels of different size.
Conditioning strong_conditioning() {
    Conditioning c;
    for (int i = 0; i < 30; ++i) {
        c.rope.push_back({static_cast<uint16_t>(i), static_cast<uint16_t>(i + 32),
                          static_cast<float>(.004 * std::pow(1000.0, -i / 30.0))});
    }
    c.mu = normals(kElements, 7, 8);
    for (const float v : normals(kElements, 8)) {
        c.lambda.push_back(std::exp(v / 2));
    }
    return storable(c);
}

// Rows as a model would write them: the mean turned to the position, and noise that lambda makes even.
std::vector<float> turned_row(const Conditioning& c, int64_t position, uint32_t seed) {
    std::vector<float> x = normals(kElements, seed);
    for (size_t head = 0; head < 2; ++head) {
        std::vector<double> mean(64);
        std::transform(c.mu.begin() + static_cast<ptrdiff_t>(64 * head),
                       c.mu.begin() + static_cast<ptrdiff_t>(64 * head) + 64, mean.begin(),
                       [](float m) { return static_cast<double>(m); });
        for (const RopePair& pair : c.rope) {
            const double angle = static_cast<double>(pair.theta) * static_cast<double>(position);
            const double a = mean[pair.first];
            const double b = mean[pair.second];
            mean[pair.first] = a * std::cos(angle) - b * std::sin(angle);
            mean[pair.second] = a * std::sin(angle) + b * std::cos(angle);
        }
        for (size_t i = 0; i < 64; ++i) {
            float& v = x[64 * head + i];
            v = static_cast<float>(mean[i]) + v / c.lambda[64 * head + i];
        }
    }
    return x;
}

// Writes rows [first, first + n) at positions `from` + row, in one batch.
void write_turned(Store& store, const Conditioning& c, int64_t first, int64_t n, int64_t from, Staging* staging) {
    std::vector<float> x;
    std::vector<int64_t> index;
    std::vector<int32_t> position;
    for (int64_t row = first; row < first + n; ++row) {
        const std::vector<float> one = turned_row(c, from + row, static_cast<uint32_t>(1000 + row));
        x.insert(x.end(), one.begin(), one.end());
        index.push_back(row);
        position.push_back(static_cast<int32_t>(from + row));
    }
    const Status status = store.write(x.data(), kElements, index.data(), n, {}, staging, position.data());
    ASSERT_TRUE(status.ok()) << status.message();
}

std::vector<uint8_t> row_codes(const Store& store, int64_t row) {
    const Store::Impl& m = store.impl();
    std::vector<uint8_t> all;
    std::vector<uint8_t> codes(64);
    for (int head = 0; head < m.shape.kv_heads; ++head) {
        gather_codes(m, row, head, codes.data());
        all.insert(all.end(), codes.begin(), codes.end());
        const uint16_t scale = m.tile_scales(head, row / kTileRows)[row % kTileRows];
        all.push_back(static_cast<uint8_t>(scale));
        all.push_back(static_cast<uint8_t>(scale >> 8));
    }
    return all;
}

// Mean of |decoded - true|^2 / |true|^2 over rows of codes.
double error_of(const Store& store, const Conditioning& c, int64_t first, int64_t n, int64_t from) {
    double error = 0;
    double energy = 0;
    const std::vector<float> zeros(kElements);
    for (int64_t row = first; row < first + n; ++row) {
        const std::vector<float> x = turned_row(c, from + row, static_cast<uint32_t>(1000 + row));
        error += squared_distance(read_row(store, row).data(), x.data(), kElements);
        energy += squared_distance(zeros.data(), x.data(), kElements);
    }
    return error / energy;
}

TEST(Condition, BlockMeansFitAnyPosition) {
    const Conditioning c = strong_conditioning();
    Conditioning constant = c; // what a mean that does not turn would do
    constant.rope.clear();
    for (const int64_t from : {0, 5000, 100000}) {
        const auto turning = make_store(kShape, {4, 0, 0}, c);
        const auto still = make_store(kShape, {4, 0, 0}, constant);
        const auto plain = make_store(kShape, {4, 0, 0});
        for (Store* store : {turning.get(), still.get(), plain.get()}) {
            write_turned(*store, c, 0, 600, from, nullptr);
        }
        const double with = error_of(*turning, c, 0, 600, from);
        EXPECT_LT(with, .75 * error_of(*plain, c, 0, 600, from)) << from;
        EXPECT_LT(with, .75 * error_of(*still, c, 0, 600, from)) << from;
    }
}

TEST(Condition, LaterIsTheSameAsFromTheStart) {
    const Conditioning c = strong_conditioning();
    for (const int64_t batch : {1, 7, 150, 400}) {
        const auto first = make_store(kShape, {4, 8, 2}, c);
        const auto later = make_store(kShape, {4, 8, 2, 192});
        EXPECT_TRUE(later->calibrating());
        EXPECT_EQ(later->conditioning_id(), 0U);
        Staging staging;
        int64_t rows = 0;
        while (rows + batch <= 192 || rows == 0) {
            write_turned(*later, c, rows, batch, 300, &staging);
            write_turned(*first, c, rows, batch, 300, nullptr);
            rows += batch;
            if (rows == batch) {
                ASSERT_TRUE(later->pin(0, &staging).ok());
            }
        }
        for (int64_t row = std::max<int64_t>(0, rows - 192); row < rows; ++row) {
            EXPECT_TRUE(later->is_exact(row));
        }
        ASSERT_TRUE(later->condition(c, &staging, {}).ok());
        EXPECT_FALSE(later->calibrating());
        EXPECT_EQ(later->conditioning_id(), first->conditioning_id());
        EXPECT_EQ(later->bytes(), first->bytes()) << "the calibration rows' memory went back";
        EXPECT_TRUE(later->is_pinned(0));
        for (int64_t row = 0; row < rows; ++row) {
            ASSERT_EQ(row_codes(*later, row), row_codes(*first, row)) << "row " << row << ", batches of " << batch;
            EXPECT_EQ(later->is_exact(row), row == 0 || row >= rows - 8) << row;
        }
        // And it goes on like any store.
        write_turned(*later, c, rows, 20, 300, nullptr);
        write_turned(*first, c, rows, 20, 300, nullptr);
        for (int64_t row = 0; row < rows + 20; ++row) {
            ASSERT_EQ(row_codes(*later, row), row_codes(*first, row));
        }
        EXPECT_TRUE(later->is_exact(rows + 12));
        EXPECT_FALSE(later->is_exact(rows + 11));
    }
}

TEST(Condition, RowsWithoutFp16ValuesAreTranslated) {
    const Conditioning c = strong_conditioning();
    const auto store = make_store(kShape, {8, 0, 0});
    write_turned(*store, c, 0, 300, 0, nullptr);
    const double before = error_of(*store, c, 0, 300, 0);
    ASSERT_TRUE(store->condition(c, nullptr, {}).ok());
    EXPECT_LT(error_of(*store, c, 0, 300, 0), 2.5 * before);
    Conditioning other = c;
    std::swap(other.mu[3], other.mu[4]);
    ASSERT_TRUE(store->condition(other, nullptr, {}).ok()) << "and once more";
    EXPECT_NE(store->conditioning_id(), conditioning_id(c, 64, 2));
    EXPECT_LT(error_of(*store, c, 0, 300, 0), 4 * before);
}

TEST(Condition, ThreadsDoNotMatter) {
    const Conditioning c = strong_conditioning();
    const auto one = make_store(kShape, {3, 4, 0, 64});
    const auto two = make_store(kShape, {3, 4, 0, 64});
    testing::ThreadPool threads;
    for (Store* store : {one.get(), two.get()}) {
        write_turned(*store, c, 0, 500, 40, nullptr);
    }
    ASSERT_TRUE(one->condition(c, nullptr, {}).ok());
    ASSERT_TRUE(two->condition(c, nullptr, threads.parallel()).ok());
    for (int64_t row = 0; row < 500; ++row) {
        ASSERT_EQ(row_codes(*one, row), row_codes(*two, row));
    }
}

TEST(Condition, RefusesWhatDoesNotFit) {
    const auto store = make_store(kShape, {4, 0, 0});
    Conditioning c;
    c.mu.resize(3);
    EXPECT_NE(store->condition(c, nullptr, {}).message().find("3 means"), std::string::npos);
    const auto values = make_store({Side::value, 64, 2, 100}, {4, 0, 0});
    EXPECT_NE(values->condition(strong_conditioning(), nullptr, {}).message().find("values"), std::string::npos);
    const auto plain = make_store(kShape, {16, 0, 0, 192});
    EXPECT_FALSE(plain->calibrating());
    EXPECT_TRUE(plain->condition(strong_conditioning(), nullptr, {}).ok());
    EXPECT_EQ(plain->conditioning_id(), 0U);
}

TEST(Condition, ACopyBringsBlocksAlong) {
    const Conditioning c = strong_conditioning();
    const auto source = make_store(kShape, {4, 4, 0}, c);
    const auto copy = make_store(kShape, {4, 4, 0}, c);
    write_turned(*copy, c, 0, 100, 90000, nullptr); // other blocks, known in another order
    write_turned(*source, c, 0, 400, 3000, nullptr);
    ASSERT_TRUE(copy->copy_from(*source).ok());
    for (int64_t row = 0; row < 400; ++row) {
        ASSERT_EQ(read_row(*copy, row), read_row(*source, row)) << row;
    }
    EXPECT_FALSE(make_store(kShape, {4, 4, 0})->copy_from(*source).ok()) << "another conditioning";
}

// A row's block is kept in a byte until there are more than 256 of them.
TEST(Condition, MoreBlocksThanAByteTells) {
    constexpr int64_t kRows = 400;
    const Conditioning c = strong_conditioning();
    const auto store = make_store(kShape, {4, 0, 0}, c);
    const size_t narrow = store->bytes();
    std::vector<std::vector<float>> as_written;
    for (int64_t row = 0; row < kRows; ++row) {
        const auto position = static_cast<int32_t>(kPositionBlock * row);
        const std::vector<float> x = turned_row(c, position, static_cast<uint32_t>(row));
        ASSERT_TRUE(store->write(x.data(), kElements, &row, 1, {}, nullptr, &position).ok());
        as_written.push_back(read_row(*store, row));
        EXPECT_EQ(store->bytes(), narrow + (row < 256 ? 0 : kShape.rows)) << row;
    }
    const auto copy = make_store(kShape, {4, 0, 0}, c);
    ASSERT_TRUE(copy->copy_from(*store).ok());
    for (int64_t row = 0; row < kRows; ++row) {
        ASSERT_EQ(store->impl().row_block(row), row);
        ASSERT_EQ(read_row(*store, row), as_written[static_cast<size_t>(row)]) << row;
        ASSERT_EQ(read_row(*copy, row), as_written[static_cast<size_t>(row)]) << row;
    }
    // And back: what is narrow over what is wide.
    const auto few = make_store(kShape, {4, 0, 0}, c);
    write_turned(*few, c, 0, 300, 500, nullptr);
    ASSERT_TRUE(copy->copy_from(*few).ok());
    for (int64_t row = 0; row < 300; ++row) {
        ASSERT_EQ(read_row(*copy, row), read_row(*few, row)) << row;
    }
    size_t long_bytes = 0;
    size_t short_bytes = 0;
    ASSERT_TRUE(Store::bytes({Side::key, 64, 2, 65536}, {4, 0, 0}, short_bytes).ok());
    ASSERT_TRUE(Store::bytes({Side::key, 64, 2, 65536 + 64}, {4, 0, 0}, long_bytes).ok());
    EXPECT_GT(long_bytes - short_bytes, 65536) << "a context in which a byte is too little is reserved with two";
}

TEST(Condition, AShiftMovesRowsToTheirNewBlock) {
    const Conditioning c = strong_conditioning();
    const auto store = make_store(kShape, {4, 0, 0}, c);
    write_turned(*store, c, 0, 200, 2100, nullptr); // block 8
    EXPECT_EQ(store->impl().row_block(150), 8);
    double error = 0;
    for (int64_t row = 0; row < 200; ++row) {
        const std::vector<float> x = turned_row(c, 100 + row, static_cast<uint32_t>(row));
        ASSERT_TRUE(store->rewrite(row, x.data(), -2000).ok());
        error += squared_distance(read_row(*store, row).data(), x.data(), kElements);
    }
    EXPECT_LE(store->impl().row_block(150), 1);
    const auto fresh = make_store(kShape, {4, 0, 0}, c);
    double fresh_error = 0;
    for (int64_t row = 0; row < 200; ++row) {
        const std::vector<float> x = turned_row(c, 100 + row, static_cast<uint32_t>(row));
        const int32_t position = static_cast<int32_t>(100 + row);
        ASSERT_TRUE(fresh->write(x.data(), kElements, &row, 1, {}, nullptr, &position).ok());
        fresh_error += squared_distance(read_row(*fresh, row).data(), x.data(), kElements);
    }
    EXPECT_LT(error, 1.3 * fresh_error);
}

// The comparison format: 4.5 bits a value, with and without our conditioning, our exact rows.
TEST(EmulatedQ4, QuantisesLikeQ4WithOurConditioning) {
    const Conditioning c = strong_conditioning();
    const auto plain = make_store(kShape, {.bits = 16, .emulate_q4_0 = true});
    const auto conditioned = make_store(kShape, {.bits = 16, .window = 8, .emulate_q4_0 = true}, c);
    const auto later = make_store(kShape, {.bits = 16, .window = 8, .calibration_rows = 400, .emulate_q4_0 = true});
    for (Store* store : {plain.get(), conditioned.get(), later.get()}) {
        write_turned(*store, c, 0, 300, 1000, nullptr);
    }
    ASSERT_TRUE(later->condition(c, nullptr, {}).ok());
    const double without = error_of(*plain, c, 0, 290, 1000);
    const double with = error_of(*conditioned, c, 0, 290, 1000);
    EXPECT_LT(with, .8 * without);
    EXPECT_GT(with, 0);
    EXPECT_EQ(error_of(*later, c, 0, 290, 1000), with);
    EXPECT_TRUE(conditioned->is_exact(292));
    EXPECT_FALSE(conditioned->is_exact(291));
    // On normals: steps of an eighth of the largest of 32, some .0075 of the energy.
    const auto normal = make_store(kShape, {.bits = 16, .emulate_q4_0 = true});
    double error = 0;
    for (int64_t row = 0; row < 200; ++row) {
        const std::vector<float> x = normals(kElements, static_cast<uint32_t>(row));
        ASSERT_TRUE(normal->write(x.data(), kElements, &row, 1, {}, nullptr).ok());
        error += squared_distance(read_row(*normal, row).data(), x.data(), kElements) / kElements / 200;
    }
    EXPECT_NEAR(error, .0078, .0012);
}

// ---- saved rows --------------------------------------------------------------------------------------------------

TEST(ConditionedRows, KeepTheirBlock) {
    const Conditioning c = strong_conditioning();
    for (const int64_t from : {0, 5000, 900000}) {
        const auto source = make_store(kShape, {4, 8, 0}, c);
        const auto copy = make_store(kShape, {4, 8, 0}, c);
        write_turned(*source, c, 0, 300, from, nullptr);
        for (int64_t row = 0; row < 300; ++row) {
            bool not_native = true;
            ASSERT_TRUE(copy->write_native(row, native_row(*source, row).data(), not_native).ok());
            ASSERT_FALSE(not_native);
            EXPECT_EQ(copy->impl().row_block(row), source->impl().row_block(row)) << row;
            EXPECT_EQ(read_row(*copy, row), read_row(*source, row)) << row;
            EXPECT_EQ(row_codes(*copy, row), row_codes(*source, row)) << row;
        }
    }
}

TEST(ConditionedRows, AnExactRowBeyondTheTagsBlocksStaysExact) {
    const Conditioning c = strong_conditioning();
    const auto source = make_store(kShape, {4, 8, 0}, c);
    const auto copy = make_store(kShape, {4, 8, 0}, c);
    const int64_t from = int64_t{5000} * kPositionBlock;
    write_turned(*source, c, 0, 1, from, nullptr);
    bool not_native = true;
    ASSERT_TRUE(copy->write_native(0, native_row(*source, 0).data(), not_native).ok());
    EXPECT_EQ(copy->impl().row_block(0), 4095);
    EXPECT_EQ(read_row(*copy, 0), read_row(*source, 0));
}

TEST(ConditionedRows, BringTheConditioningAlong) {
    const Conditioning c = strong_conditioning();
    for (const int bits : {2, 4, 8}) {
        const auto source = make_store(kShape, {bits, 0, 0}, c);
        write_turned(*source, c, 0, 300, 0, nullptr);
        std::vector<uint8_t> record;
        const auto stranger = make_store(kShape, {bits, 0, 0});
        std::map<int, std::vector<uint8_t>> pieces;
        int count = 0;
        for (int64_t row = 100; pieces.empty() || static_cast<int>(pieces.size()) < count; ++row) {
            ASSERT_LT(row, 140) << "neighbouring rows have all pieces";
            const std::vector<uint8_t> saved = native_row(*source, row);
            Store::NativePiece piece;
            ASSERT_TRUE(stranger->native_piece(saved.data(), piece));
            EXPECT_EQ(piece.conditioning_id, source->conditioning_id());
            EXPECT_EQ(piece.block, 0);
            ASSERT_LT(piece.index, piece.count);
            count = piece.count;
            pieces[piece.index].assign(piece.data, piece.data + piece.size);
            bool not_native = false;
            EXPECT_FALSE(stranger->write_native(row, saved.data(), not_native).ok()) << "not its conditioning";
        }
        for (const auto& [index, data] : pieces) {
            record.insert(record.end(), data.begin(), data.end());
        }
        Conditioning read;
        const Status status = read_conditioning(record.data(), record.size(), 64, 2, read);
        ASSERT_TRUE(status.ok()) << status.message();
        ASSERT_TRUE(stranger->condition(read, nullptr, {}).ok());
        EXPECT_EQ(stranger->conditioning_id(), source->conditioning_id());
        bool not_native = true;
        ASSERT_TRUE(stranger->write_native(5, native_row(*source, 5).data(), not_native).ok());
        EXPECT_EQ(read_row(*stranger, 5), read_row(*source, 5));
    }
}

TEST(ConditionedRows, EveryFlippedBitIsSeen) {
    const Conditioning c = strong_conditioning();
    const auto source = make_store(kShape, {4, 0, 0}, c);
    write_turned(*source, c, 0, 2, 0, nullptr);
    const std::vector<uint8_t> good = native_row(*source, 1);
    for (size_t bit = 0; bit < good.size() * 8; ++bit) {
        std::vector<uint8_t> bad = good;
        bad[bit / 8] = static_cast<uint8_t>(bad[bit / 8] ^ 1U << bit % 8);
        bool not_native = false;
        EXPECT_TRUE(!source->write_native(0, bad.data(), not_native).ok() || not_native) << bit;
        Store::NativePiece piece;
        EXPECT_FALSE(source->native_piece(bad.data(), piece)) << bit;
    }
}

} // namespace
} // namespace turboquant
