// Native rows: what a host saves must come back bit for bit, and anything else must be refused in words.
#include "cache/rows.h"
#include "cache/store_impl.h"
#include "store_testing.h"

#include <rapidcheck.h>

#include <cstring>

namespace turboquant {
namespace {

using testing::make_store;
using testing::native_row;
using testing::normals;
using testing::read_row;
using testing::write_row;
using testing::write_rows;

// Codes and scales of one row.
std::vector<uint8_t> row_codes(const Store& store, int64_t row) {
    const Store::Impl& m = store.impl();
    std::vector<uint8_t> all;
    std::vector<uint8_t> codes(static_cast<size_t>(m.shape.head_size));
    for (int head = 0; m.coded() && head < m.shape.kv_heads; ++head) {
        gather_codes(m, row, head, codes.data());
        all.insert(all.end(), codes.begin(), codes.end());
        for (int b = 0; b < m.n_blocks; ++b) {
            const uint16_t scale = m.tile_scales(head, row / kTileRows)[b * kTileRows + row % kTileRows];
            all.push_back(static_cast<uint8_t>(scale));
            all.push_back(static_cast<uint8_t>(scale >> 8));
        }
    }
    return all;
}

Status put_native(Store& store, int64_t row, const std::vector<uint8_t>& bytes, bool& not_native) {
    return store.write_native(row, bytes.data(), not_native);
}

void restore(Store& store, int64_t row, const std::vector<uint8_t>& bytes) {
    bool not_native = true;
    const Status status = put_native(store, row, bytes, not_native);
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_FALSE(not_native);
}

Conditioning some_conditioning(size_t n, uint32_t seed) {
    Conditioning c;
    c.mu = normals(n, seed);
    for (const float v : normals(n, seed + 1)) {
        c.lambda.push_back(std::exp(v));
    }
    return storable(c);
}

TEST(Native, SavesAndRestoresAnyStoreBitForBit) {
    EXPECT_TRUE(rc::check([] {
        const Side side = *rc::gen::element(Side::key, Side::value);
        const int head_size = *rc::gen::element(4, 12, 28, 32, 64, 80, 96, 112, 128, 192, 256, 512, 576);
        const int heads = *rc::gen::inRange(1, 5);
        const int bits = *rc::gen::element(2, 3, 4, 5, 6, 8, 16, 32);
        const StoreOptions options = {bits, *rc::gen::inRange(0, 10), *rc::gen::inRange(0, 4)};
        const StoreShape shape = {side, head_size, heads, 130};
        const auto seed = *rc::gen::arbitrary<uint32_t>();
        const Conditioning c =
            seed % 2 == 0 ? Conditioning() : some_conditioning(static_cast<size_t>(shape.row_elements()), seed);
        const auto source = make_store(shape, options, c);
        const auto copy = make_store(shape, options, c);
        for (const int64_t row : *rc::gen::container<std::vector<int64_t>>(20, rc::gen::inRange<int64_t>(0, 130))) {
            RC_ASSERT(write_row(*source, row, static_cast<uint32_t>(seed + row)).ok());
            if (row % 3 == 0) {
                RC_ASSERT(source->pin(row, nullptr).ok() || source->options().window == 0);
            }
        }
        const bool backwards = seed % 3 == 0; // any order
        for (int64_t i = 0; i < 130; ++i) {
            const int64_t row = backwards ? 129 - i : i;
            bool not_native = true;
            RC_ASSERT(put_native(*copy, row, native_row(*source, row), not_native).ok());
            RC_ASSERT(!not_native);
        }
        for (int64_t row = 0; row < 130; ++row) {
            RC_ASSERT(native_row(*copy, row) == native_row(*source, row));
            RC_ASSERT(read_row(*copy, row) == read_row(*source, row));
            RC_ASSERT(row_codes(*copy, row) == row_codes(*source, row));
            RC_ASSERT(copy->is_exact(row) == source->is_exact(row));
            RC_ASSERT(copy->is_pinned(row) == source->is_pinned(row));
            RC_ASSERT(bits > 8 || copy->is_written(row) == source->is_written(row));
        }
        // Ages too: the next writes push the same rows out.
        for (int64_t row = 0; row < 5; ++row) {
            RC_ASSERT(write_row(*source, 100 + row, 1).ok() && write_row(*copy, 100 + row, 1).ok());
            for (int64_t r = 0; r < 130; ++r) {
                RC_ASSERT(copy->is_exact(r) == source->is_exact(r));
            }
        }
    }));
}

TEST(Native, NeverLongerThanHalves) {
    for (const Side side : {Side::key, Side::value}) {
        for (int head_size = 4; head_size <= 1024; head_size += 4) {
            for (const int heads : {1, 2, 3, 16}) {
                for (const int bits : testing::kCodecBits) {
                    const StoreShape shape = {side, head_size, heads, 1};
                    if (shape.row_elements() >= 64) {
                        ASSERT_EQ(make_store(shape, {bits, 0, 0})->native_row_bytes(),
                                  static_cast<size_t>(2 * shape.row_elements()))
                            << head_size << ' ' << heads << ' ' << bits;
                    }
                }
            }
        }
    }
    EXPECT_EQ(make_store({Side::key, 64, 2, 1}, {16, 0, 0})->native_row_bytes(), 256U);
    EXPECT_EQ(make_store({Side::key, 64, 2, 1}, {32, 0, 0})->native_row_bytes(), 512U);
}

TEST(Native, ZerosAreARowNeverWritten) {
    for (const int bits : {2, 3, 5, 8, 16, 32}) {
        for (const Side side : {Side::key, Side::value}) {
            const auto store = make_store({side, 64, 2, 100}, {bits, 4, 1});
            const std::vector<uint8_t> zeros(store->native_row_bytes(), 0);
            EXPECT_EQ(native_row(*store, 7), zeros);
            for (int64_t r = 0; r < 10; ++r) {
                ASSERT_TRUE(write_row(*store, r, static_cast<uint32_t>(r)).ok());
                ASSERT_TRUE(r != 1 || store->pin(1, nullptr).ok());
            }
            for (const int64_t row : {1, 5, 9, 50}) { // pinned, codes only, in the ring, never written
                const std::vector<float> neighbour = read_row(*store, 4);
                restore(*store, row, zeros);
                EXPECT_FALSE(store->is_written(row));
                EXPECT_FALSE(store->is_exact(row));
                EXPECT_EQ(native_row(*store, row), zeros);
                EXPECT_EQ(read_row(*store, row), std::vector<float>(128, 0.0F));
                EXPECT_EQ(read_row(*store, 4), neighbour);
                for (const uint8_t byte : row_codes(*store, row)) {
                    ASSERT_EQ(byte, 0);
                }
            }
        }
    }
}

// A written row of zeros is a row: it comes back as one.
TEST(Native, AZeroRowIsNotAClearedRow) {
    const auto store = make_store({Side::key, 64, 2, 100}, {4, 1, 0});
    for (const int64_t row : {3, 4}) {
        ASSERT_TRUE(write_rows(*store, std::vector<float>(128, 0.0F), {row}).ok());
    }
    const auto copy = make_store({Side::key, 64, 2, 100}, {4, 1, 0});
    for (const int64_t row : {3, 4}) {
        restore(*copy, row, native_row(*store, row));
        EXPECT_TRUE(copy->is_written(row));
        EXPECT_EQ(copy->is_exact(row), row == 4);
    }
}

TEST(Native, ExactRowsFindTheirPlaceByAge) {
    const StoreShape shape = {Side::key, 64, 2, 100};
    const auto source = make_store(shape, {4, 6, 0});
    std::vector<std::vector<uint8_t>> rows;
    for (int64_t r = 0; r < 6; ++r) {
        ASSERT_TRUE(write_row(*source, r, static_cast<uint32_t>(r)).ok());
    }
    for (int64_t r = 0; r < 6; ++r) {
        rows.push_back(native_row(*source, r));
    }
    const auto small = make_store(shape, {4, 2, 1});
    for (const int64_t r : {2, 4, 1, 5, 3}) {
        restore(*small, r, rows[static_cast<size_t>(r)]);
    }
    for (int64_t r = 1; r < 6; ++r) {
        EXPECT_EQ(small->is_exact(r), r >= 4) << r; // the two youngest, whatever the order
        EXPECT_EQ(row_codes(*small, r), row_codes(*source, r));
    }
    EXPECT_EQ(small->impl().clock, 6U);
    // Written after the restore: younger than all of them.
    ASSERT_TRUE(write_row(*small, 90, 1).ok());
    EXPECT_TRUE(small->is_exact(90));
    EXPECT_TRUE(small->is_exact(5));
    EXPECT_FALSE(small->is_exact(4));

    const auto none = make_store(shape, {4, 0, 0});
    restore(*none, 0, rows[0]);
    EXPECT_FALSE(none->is_exact(0));
    EXPECT_EQ(row_codes(*none, 0), row_codes(*source, 0));
}

TEST(Native, PinnedRowsDisplaceTheLongestPinned) {
    const StoreShape shape = {Side::key, 64, 2, 100};
    const auto source = make_store(shape, {4, 6, 2});
    for (int64_t r = 0; r < 4; ++r) {
        ASSERT_TRUE(write_row(*source, r, static_cast<uint32_t>(r)).ok());
    }
    ASSERT_TRUE(source->pin(0, nullptr).ok());
    ASSERT_TRUE(source->pin(1, nullptr).ok());
    const auto target = make_store(shape, {4, 6, 1});
    restore(*target, 10, native_row(*source, 0));
    EXPECT_TRUE(target->is_pinned(10));
    restore(*target, 11, native_row(*source, 1));
    EXPECT_TRUE(target->is_pinned(11));
    EXPECT_FALSE(target->is_exact(10));
    // Without pins a pinned row is a candidate for the ring like any other.
    const auto ring = make_store(shape, {4, 6, 0});
    restore(*ring, 10, native_row(*source, 0));
    EXPECT_TRUE(ring->is_exact(10));
    EXPECT_FALSE(ring->is_pinned(10));
    // And is saved as what it has become.
    const auto again = make_store(shape, {4, 6, 2});
    restore(*again, 10, native_row(*ring, 10));
    EXPECT_FALSE(again->is_pinned(10));
}

TEST(Native, TagBitsAreTheRowsFirst64) {
    const auto store = make_store({Side::key, 48, 3, 10}, {4, 1, 0});
    for (int head = 0; head < 3; ++head) {
        std::vector<uint16_t> h(48, 0x3c01);
        clear_tag_bits(store->impl(), head, h.data());
        for (int c = 0; c < 48; ++c) {
            EXPECT_EQ(h[static_cast<size_t>(c)], 48 * head + c < 64 ? 0x3c00 : 0x3c01) << head << ' ' << c;
        }
    }
}

TEST(Native, AgesBeyond32Bits) {
    const StoreShape shape = {Side::key, 64, 1, 100};
    const auto store = make_store(shape, {4, 3, 0});
    const uint64_t start = (uint64_t{1} << 32) - 3;
    store->impl().clock = start;
    for (int64_t r = 0; r < 3; ++r) { // ages ...fe, ...ff, then 0 in the low bits
        ASSERT_TRUE(write_row(*store, r, static_cast<uint32_t>(r)).ok());
    }
    for (int64_t r = 0; r < 3; ++r) {
        const std::vector<uint8_t> bytes = native_row(*store, r);
        restore(*store, r, bytes);
        EXPECT_EQ(native_row(*store, r), bytes);
        EXPECT_EQ(store->impl().slot_age[static_cast<size_t>(store->impl().find_slot(r))],
                  start + 1 + static_cast<uint64_t>(r));
    }
    EXPECT_EQ(store->impl().clock, start + 3);
}

// A host removes rows without telling the store; rows restored afterwards must still take the ring.
TEST(Native, AnAgeShiftMakesRestoredRowsTheYoungest) {
    const StoreShape shape = {Side::key, 64, 2, 100};
    const auto store = make_store(shape, {4, 3, 0});
    std::vector<uint8_t> saved;
    for (int64_t r = 0; r < 6; ++r) {
        ASSERT_TRUE(write_row(*store, r, static_cast<uint32_t>(r)).ok());
    }
    for (const int64_t r : {2, 5, 3, 4}) { // 2 has codes only
        const std::vector<uint8_t> row = native_row(*store, r);
        saved.insert(saved.end(), row.begin(), row.end());
    }
    const std::vector<float> before = read_row(*store, 5);
    for (int64_t r = 50; r < 60; ++r) {
        ASSERT_TRUE(write_row(*store, r, static_cast<uint32_t>(r)).ok());
    }
    const size_t stride = store->native_row_bytes();
    const int64_t shift = store->restored_age_shift(saved.data(), stride, 4);
    EXPECT_EQ(shift, 17 - 4);
    for (const int64_t i : {0, 1, 2, 3}) {
        const int64_t row = std::vector<int64_t>{12, 15, 13, 14}[static_cast<size_t>(i)];
        bool not_native = true;
        ASSERT_TRUE(store->write_native(row, saved.data() + static_cast<size_t>(i) * stride, not_native, shift).ok());
        EXPECT_FALSE(not_native);
    }
    for (int64_t row = 0; row < 100; ++row) {
        EXPECT_EQ(store->is_exact(row), row >= 13 && row <= 15) << row;
    }
    EXPECT_EQ(read_row(*store, 15), before);
    ASSERT_TRUE(write_row(*store, 16, 1).ok());
    EXPECT_FALSE(store->is_exact(13)) << "13 was the oldest";
    EXPECT_TRUE(store->is_exact(14));
    EXPECT_EQ(make_store(shape, {4, 3, 0})->restored_age_shift(saved.data(), stride, 1), 0);
}

void expect_refused(Store& store, const std::vector<uint8_t>& bytes, const char* word) {
    const std::vector<uint8_t> before = native_row(store, 3);
    bool not_native = true;
    const Status status = put_native(store, 3, bytes, not_native);
    EXPECT_FALSE(status.ok()) << word;
    EXPECT_FALSE(not_native);
    EXPECT_NE(status.message().find(word), std::string::npos) << status.message();
    EXPECT_EQ(native_row(store, 3), before);
}

TEST(Native, WhatDoesNotFitIsRefused) {
    const StoreShape shape = {Side::key, 64, 2, 100};
    const auto store = make_store(shape, {4, 0, 0});
    ASSERT_TRUE(write_row(*store, 3, 1).ok());
    const auto row_of = [](const StoreShape& s, int bits, const Conditioning& c = {}) {
        const auto other = make_store(s, {bits, 0, 0}, c);
        EXPECT_TRUE(write_row(*other, 0, 5).ok());
        return native_row(*other, 0);
    };
    restore(*store, 0, row_of(shape, 4));
    expect_refused(*store, row_of(shape, 5), "5 bits");
    expect_refused(*store, row_of({Side::value, 64, 2, 100}, 4), "values");
    expect_refused(*store, row_of({Side::key, 32, 4, 100}, 4), "head size 32");
    expect_refused(*store, row_of({Side::key, 128, 1, 100}, 4), "1 heads");
    expect_refused(*store, row_of(shape, 4, some_conditioning(128, 1)), "conditioning");
    std::vector<uint8_t> newer = row_of(shape, 4);
    newer[4] = 3;
    expect_refused(*store, newer, "version 3");
    bool not_native = true;
    EXPECT_FALSE(put_native(*store, 100, newer, not_native).ok());
    EXPECT_FALSE(put_native(*store, -1, newer, not_native).ok());
}

TEST(Native, EveryFlippedBitOfACodedRowIsSeen) {
    for (const int bits : {3, 4}) {
        const auto store = make_store({Side::value, 64, 2, 100}, {bits, 0, 0});
        ASSERT_TRUE(write_row(*store, 3, 1).ok());
        ASSERT_TRUE(write_row(*store, 4, 2).ok());
        const std::vector<uint8_t> good = native_row(*store, 4);
        const size_t used = 24 + 2 * (2 + 64 * static_cast<size_t>(bits) / 8);
        for (size_t bit = 0; bit < used * 8; ++bit) {
            std::vector<uint8_t> bad = good;
            bad[bit / 8] = static_cast<uint8_t>(bad[bit / 8] ^ 1U << bit % 8);
            const std::vector<uint8_t> before = native_row(*store, 3);
            bool not_native = false;
            const Status status = put_native(*store, 3, bad, not_native);
            EXPECT_TRUE(!status.ok() || not_native) << "bit " << bit;
            EXPECT_EQ(not_native, bit < 32) << bit; // without its magic it is no native row
            EXPECT_EQ(native_row(*store, 3), before);
        }
    }
}

TEST(Native, DamagedTagsAreSeen) {
    const auto store = make_store({Side::key, 64, 2, 100}, {4, 4, 0});
    ASSERT_TRUE(write_row(*store, 3, 1).ok());
    ASSERT_TRUE(write_row(*store, 4, 2).ok());
    const std::vector<uint8_t> good = native_row(*store, 4);
    for (size_t element = 0; element < 64; ++element) {
        std::vector<uint8_t> bad = good;
        bad[2 * element] ^= 1;
        if (element < 24) {
            bool not_native = false;
            EXPECT_TRUE(put_native(*store, 3, bad, not_native).ok());
            EXPECT_TRUE(not_native) << "no magic: taken for plain values";
        } else {
            expect_refused(*store, bad, "tag");
        }
    }
    std::vector<uint8_t> infinite = good;
    infinite[200] = 0;
    infinite[201] = 0x7c;
    expect_refused(*store, infinite, "not finite");
}

TEST(Native, PlainRowsAreNotNative) {
    const auto store = make_store({Side::key, 64, 2, 100}, {4, 4, 0});
    ASSERT_TRUE(write_row(*store, 3, 1).ok());
    const std::vector<uint8_t> before = native_row(*store, 3);
    std::mt19937 generator(1);
    for (int kind = 0; kind < 3000; ++kind) {
        std::vector<uint16_t> h(128);
        for (uint16_t& v : h) {
            v = kind == 0 ? 0x3c00 : kind == 1 ? 0xffff : kind == 2 ? 0x0001 : static_cast<uint16_t>(generator());
        }
        std::vector<uint8_t> bytes(256);
        std::memcpy(bytes.data(), h.data(), 256);
        bool not_native = false;
        ASSERT_TRUE(put_native(*store, 3, bytes, not_native).ok());
        ASSERT_TRUE(not_native);
        ASSERT_EQ(native_row(*store, 3), before);
    }
}

// Anything may stand in a saved file.
TEST(Native, ArbitraryBytesNeverCrash) {
    EXPECT_TRUE(rc::check([] {
        const auto store = make_store({*rc::gen::element(Side::key, Side::value), 32, 3, 70},
                                      {*rc::gen::element(2, 3, 4, 5, 6, 8, 16, 32), 4, 2});
        RC_ASSERT(write_row(*store, 5, 1).ok());
        std::vector<uint8_t> bytes = *rc::gen::element(native_row(*store, 5), native_row(*store, 6));
        for (const auto& [at, value] : *rc::gen::container<std::vector<std::pair<size_t, uint8_t>>>(
                 *rc::gen::inRange(0, 10),
                 rc::gen::pair(rc::gen::inRange<size_t>(0, bytes.size()), rc::gen::arbitrary<uint8_t>()))) {
            bytes[at] = value;
        }
        bool not_native = false;
        const Status status = put_native(*store, 7, bytes, not_native);
        RC_ASSERT(status.ok() || !status.message().empty());
        for (const float v : read_row(*store, 7)) {
            RC_ASSERT(store->options().bits > 8 || std::isfinite(v));
        }
        RC_ASSERT(write_row(*store, 7, 2).ok());
    }));
}

// The bytes themselves: a cache saved today must be readable for ever.
TEST(Native, FormatIsPinned) {
    const auto store = make_store({Side::key, 64, 1, 10}, {4, 1, 0});
    std::vector<float> x(64);
    for (size_t i = 0; i < 64; ++i) {
        x[i] = static_cast<float>(static_cast<int>(i * 37 % 64) - 32) / 16;
    }
    ASSERT_TRUE(write_rows(*store, x, {0}).ok());
    const auto hex = [](const std::vector<uint8_t>& bytes, size_t n) {
        static const char digits[] = "0123456789abcdef";
        std::string s;
        for (size_t i = 0; i < n; ++i) {
            s += digits[bytes[i] >> 4];
            s += digits[bytes[i] & 15];
        }
        return s;
    };
    EXPECT_EQ(hex(native_row(*store, 0), 128),
              "01c0003581bd813b00ba403e01b040bf0138c0bc803c81b8003f002c81be813901bc403d01b6c03f0134c1bd003b81ba"
              "003e01b280bf003700bd403c00b9c03e0000c0be003940bc003d00b7803f003200be803a00bbc03d00b4c0bf003640bd"
              "003c80b9803e00ac00bf803880bcc03c00b8403f003041be003a81bb803d01b5");
    ASSERT_TRUE(write_row(*store, 1, 1).ok());
    EXPECT_EQ(hex(native_row(*store, 0), 54),
              "547f517f020004004000010000000000000000003c1271c3b525a8acad78b2f0e66d4b4d8035bc34bf9ef414fb492827"
              "22cc9dd2100d");
}

} // namespace
} // namespace turboquant
