// Codes and scales of the GPU are those of the CPU's store, bit for bit, whatever the rows, the slots and the layout.
#include "cuda_testing.h"

#include "cache/conditioner.h"
#include "cache/rows.h"
#include "turboquant/conditioning.h"

#include <memory>

namespace turboquant::cuda_tests {
namespace {

struct EncodeCase {
    int head_size = 128;
    int kv_heads = 2;
    int key_bits = 4;
    int value_bits = 4;
    int page_size = 64;
    int64_t n = 100;
    bool scattered = false; // slots in random order, else runs that fill whole tiles
    bool conditioned = false;
    bool nonfinite = true;
    bool turning = false; // conditioned: keys that RoPE turns, a mean for every 256 positions
};

// What the CPU's store makes of rows: codes [n][kv_heads][head_size] and scales [n][kv_heads].
void cpu_codes(const EncodeCase& c, Side side, const std::vector<float>& x, const Conditioning& conditioning,
               const std::vector<int32_t>& position, std::vector<uint8_t>& codes, std::vector<uint16_t>& scales) {
    StoreShape shape;
    shape.side = side;
    shape.head_size = c.head_size;
    shape.kv_heads = c.kv_heads;
    shape.rows = c.n;
    StoreOptions options;
    options.bits = side == Side::key ? c.key_bits : c.value_bits;
    std::unique_ptr<Store> store;
    ASSERT_TRUE(Store::create(shape, options, conditioning, store).ok());
    std::vector<int64_t> index(static_cast<size_t>(c.n));
    std::iota(index.begin(), index.end(), 0);
    ASSERT_TRUE(store
                    ->write(x.data(), shape.row_elements(), index.data(), c.n, ParallelFor{}, nullptr,
                            position.empty() ? nullptr : position.data())
                    .ok());
    for (int64_t r = 0; r < c.n; ++r) {
        for (int h = 0; h < c.kv_heads; ++h) {
            const size_t at = static_cast<size_t>(r * c.kv_heads + h);
            gather_codes(store->impl(), r, h, codes.data() + at * static_cast<size_t>(c.head_size));
            scales[at] = store->impl().tile_scales(h, r / kTileRows)[r % kTileRows];
        }
    }
}

void check_encode(const EncodeCase& c, uint32_t seed) {
    std::mt19937 random(seed);
    const int elements = c.kv_heads * c.head_size;
    const std::vector<float> rows[2] = {make_rows(random, c.n, elements, c.head_size, c.nonfinite),
                                        make_rows(random, c.n, elements, c.head_size, c.nonfinite)};
    Conditioning conditioning;
    if (c.conditioned) {
        std::normal_distribution<float> normal;
        for (int e = 0; e < elements; ++e) {
            conditioning.mu.push_back(3 * normal(random));
            conditioning.lambda.push_back(std::exp(0.5F * normal(random)));
        }
        if (c.turning) {
            for (int p = 0; p < c.head_size / 2 - 3; ++p) { // the rest does not turn
                conditioning.rope.push_back(
                    {static_cast<uint16_t>(p), static_cast<uint16_t>(p + c.head_size / 2),
                     std::pow(10000.0F, -2.0F * static_cast<float>(p) / static_cast<float>(c.head_size))});
            }
        }
        conditioning = storable(conditioning);
    }
    constexpr int kBlocks = 6;
    std::vector<float> means = conditioning.mu;
    std::vector<int64_t> positions;
    if (c.turning) {
        means.resize(kBlocks * static_cast<size_t>(elements));
        Conditioner conditioner; // to the last bit as the store has them
        Rotation rotation;
        ASSERT_TRUE(Rotation::create(c.head_size, rotation).ok());
        conditioner.set(conditioning, rotation, c.kv_heads);
        for (int block = 0; block < kBlocks; ++block) {
            conditioner.add_block(block);
            std::vector<float> mean(static_cast<size_t>(elements));
            block_mean(conditioning, c.head_size, c.kv_heads, block, mean.data());
            for (int head = 0; head < c.kv_heads; ++head) {
                float* const out = means.data() + block * elements + head * c.head_size;
                conditioner.head_mean(head, block, out);
                for (int e = 0; e < c.head_size; ++e) {
                    ASSERT_NEAR(out[e], mean[static_cast<size_t>(head * c.head_size + e)], 1e-5);
                }
            }
        }
        for (int64_t r = 0; r < c.n; ++r) {
            positions.push_back(static_cast<int64_t>(random() % (kBlocks * 256)));
        }
    }
    CacheShape shape{c.head_size, c.kv_heads, c.key_bits, c.value_bits, c.page_size, 0};
    shape.n_pages = 2 * ((c.n + c.page_size - 1) / c.page_size) + 1;
    tq_cuda_cache cache = make_cache(shape);
    // Memory that was something else before.
    const Device<uint8_t> pages(tq_cuda_page_bytes(&cache) * static_cast<size_t>(shape.n_pages), 0xa5);
    cache.pages = pages.get();
    const int odd = c.scattered ? 1 : 0; // not aligned for vectors
    means.insert(means.begin(), static_cast<size_t>(odd), 1e3F);
    const Device<float> mu(means);
    const Device<int64_t> device_positions(positions);
    const Device<float> lambda(conditioning.lambda);
    if (c.conditioned) {
        cache.mu = mu.get() + odd;
        cache.lambda = lambda.get();
        cache.mu_blocks = c.turning ? kBlocks : 0;
    }
    std::vector<int64_t> slots(static_cast<size_t>(shape.n_pages * c.page_size));
    std::iota(slots.begin(), slots.end(), 0);
    if (c.scattered) {
        std::shuffle(slots.begin(), slots.end(), random);
    } else {
        std::rotate(slots.begin(), slots.begin() + c.page_size, slots.end());
    }
    slots.resize(static_cast<size_t>(c.n));
    const Device<int64_t> device_slots(slots);
    const Device<float> keys(rows[0]);
    const Device<float> values(rows[1]);
    tq_cuda_write write{};
    write.struct_size = sizeof write;
    write.keys = keys.get();
    write.values = values.get();
    write.type = TQ_CUDA_F32;
    write.key_stride = write.value_stride = elements;
    write.key_head_stride = write.value_head_stride = c.head_size;
    write.n = c.n;
    write.slots = device_slots.get();
    write.positions = c.turning ? device_positions.get() : nullptr;
    ASSERT_EQ(tq_cuda_encode(&cache, &write, nullptr), TQ_OK) << tq_cuda_last_error();
    const size_t parts = static_cast<size_t>(c.n * c.kv_heads);
    const Device<uint8_t> codes(2 * parts * static_cast<size_t>(c.head_size), 0xee);
    const Device<uint16_t> scales(2 * parts, 0xee);
    ASSERT_EQ(tq_cuda_read(&cache, device_slots.get(), nullptr, c.n, codes.get(), scales.get(), nullptr, 0, 0, nullptr),
              TQ_OK);
    TQ_CUDA_OK(cudaDeviceSynchronize());
    const std::vector<uint8_t> got_codes = codes.host();
    const std::vector<uint16_t> got_scales = scales.host();
    for (const Side side : {Side::key, Side::value}) {
        const size_t s = side == Side::key ? 0 : 1;
        std::vector<uint8_t> want_codes(parts * static_cast<size_t>(c.head_size));
        std::vector<uint16_t> want_scales(parts);
        cpu_codes(c, side, rows[s], side == Side::key ? conditioning : Conditioning{},
                  side == Side::key ? std::vector<int32_t>(positions.begin(), positions.end()) : std::vector<int32_t>{},
                  want_codes, want_scales);
        for (size_t p = 0; p < parts; ++p) {
            ASSERT_EQ(got_scales[s * parts + p], want_scales[p]) << "side " << s << " row and head " << p;
        }
        for (size_t e = 0; e < want_codes.size(); ++e) {
            ASSERT_EQ(got_codes[s * want_codes.size() + e], want_codes[e])
                << "side " << s << " row and head " << e / static_cast<size_t>(c.head_size) << " channel "
                << e % static_cast<size_t>(c.head_size);
        }
    }
}

TEST(CudaEncode, SameCodesAsTheCpuForAllShapes) {
    TQ_NEED_GPU();
    uint32_t seed = 1;
    for (const int head_size : {64, 128, 256}) {
        for (const int key_bits : {2, 3, 4, 8}) {
            for (const int value_bits : {2, 3, 4, 8}) {
                for (const bool scattered : {false, true}) {
                    EncodeCase c;
                    c.head_size = head_size;
                    c.key_bits = key_bits;
                    c.value_bits = value_bits;
                    c.scattered = scattered;
                    c.conditioned = (key_bits + value_bits) % 3 == 0;
                    SCOPED_TRACE(testing::Message() << "d " << head_size << " bits " << key_bits << '/' << value_bits
                                                    << " scattered " << scattered);
                    check_encode(c, seed++);
                    if (testing::Test::HasFatalFailure()) {
                        return;
                    }
                }
            }
        }
    }
}

TEST(CudaEncode, SameCodesWithTheMeanOfAPosition) {
    TQ_NEED_GPU();
    for (const int head_size : {64, 128, 256}) {
        EncodeCase c;
        c.head_size = head_size;
        c.n = 500;
        c.conditioned = c.turning = true;
        SCOPED_TRACE(head_size);
        check_encode(c, static_cast<uint32_t>(head_size));
        c.scattered = true;
        check_encode(c, static_cast<uint32_t>(head_size) + 1);
        if (testing::Test::HasFatalFailure()) {
            return;
        }
    }
}

TEST(CudaEncode, SameCodesForManyRowsAndAllPageSizes) {
    TQ_NEED_GPU();
    for (const int page_size : {16, 32, 64, 128, 256}) {
        EncodeCase c;
        c.page_size = page_size;
        c.kv_heads = 3;
        c.n = 3000;
        c.conditioned = page_size == 32;
        SCOPED_TRACE(page_size);
        check_encode(c, static_cast<uint32_t>(page_size));
        c.scattered = true;
        check_encode(c, static_cast<uint32_t>(page_size) + 1);
        if (testing::Test::HasFatalFailure()) {
            return;
        }
    }
}

TEST(CudaEncode, LeavesOtherTokensAlone) {
    TQ_NEED_GPU();
    // Tokens one at a time, as decoding appends them, must give what one call gives.
    CacheShape shape;
    shape.n_pages = 2;
    tq_cuda_cache cache = make_cache(shape);
    const int elements = shape.kv_heads * shape.head_size;
    constexpr int64_t kRows = 100;
    std::mt19937 random(5);
    const Device<float> rows(make_rows(random, kRows, elements, shape.head_size, false));
    std::vector<int64_t> slots(kRows);
    std::iota(slots.begin(), slots.end(), 3);
    const Device<int64_t> device_slots(slots);
    std::vector<uint8_t> pages[2];
    for (const bool single : {false, true}) {
        const Device<uint8_t> memory(tq_cuda_page_bytes(&cache) * 2);
        cache.pages = memory.get();
        for (int64_t r = 0; r < (single ? kRows : 1); ++r) {
            tq_cuda_write write{};
            write.struct_size = sizeof write;
            write.keys = rows.get() + r * elements;
            write.values = rows.get() + r * elements;
            write.key_stride = write.value_stride = elements;
            write.key_head_stride = write.value_head_stride = shape.head_size;
            write.n = single ? 1 : kRows;
            write.slots = device_slots.get() + r;
            ASSERT_EQ(tq_cuda_encode(&cache, &write, nullptr), TQ_OK);
        }
        pages[single ? 1 : 0] = memory.host();
    }
    EXPECT_EQ(pages[0], pages[1]);
}

TEST(CudaEncode, RefusesInWords) {
    CacheShape shape;
    tq_cuda_cache cache = make_cache(shape);
    tq_cuda_write write{};
    write.struct_size = sizeof write;
    EXPECT_EQ(tq_cuda_encode(&cache, &write, nullptr), TQ_INVALID_ARGUMENT);
    EXPECT_STREQ(tq_cuda_last_error(), "tq_cuda_encode: no pages");
    uint64_t memory[2] = {};
    cache.pages = memory;
    cache.key_bits = 5;
    EXPECT_EQ(tq_cuda_encode(&cache, &write, nullptr), TQ_INVALID_ARGUMENT);
    EXPECT_STREQ(tq_cuda_last_error(), "tq_cuda_encode: key_bits 5 is not 2, 3, 4 or 8");
    EXPECT_EQ(tq_cuda_page_bytes(&cache), 0U);
    cache.key_bits = 4;
    cache.head_size = 80;
    EXPECT_EQ(tq_cuda_encode(&cache, &write, nullptr), TQ_INVALID_ARGUMENT);
    EXPECT_STREQ(tq_cuda_last_error(), "tq_cuda_encode: head_size 80 is not 64, 128 or 256");
    cache.head_size = 128;
    cache.page_size = 48;
    EXPECT_EQ(tq_cuda_encode(&cache, &write, nullptr), TQ_INVALID_ARGUMENT);
    cache.page_size = 64;
    write.n = 1;
    EXPECT_EQ(tq_cuda_encode(&cache, &write, nullptr), TQ_INVALID_ARGUMENT);
    EXPECT_STREQ(tq_cuda_last_error(), "tq_cuda_encode: keys, values or slots are null, or n is negative");
    const float mean = 0;
    const int64_t slot = 0;
    write.keys = write.values = &mean;
    write.slots = &slot;
    cache.mu = &mean;
    cache.mu_blocks = 3;
    EXPECT_EQ(tq_cuda_encode(&cache, &write, nullptr), TQ_INVALID_ARGUMENT);
    EXPECT_STREQ(tq_cuda_last_error(), "tq_cuda_encode: a cache with mu_blocks needs positions");
    write.type = 7;
    EXPECT_EQ(tq_cuda_encode(&cache, &write, nullptr), TQ_INVALID_ARGUMENT);
}

} // namespace
} // namespace turboquant::cuda_tests
