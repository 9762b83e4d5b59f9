// Codes and scales of the GPU are those of the CPU's store, bit for bit, whatever the rows, the slots and the layout.
#include "cuda_testing.h"

#include "cache/rows.h"

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
};

// What the CPU's store makes of rows: codes [n][kv_heads][head_size] and scales [n][kv_heads].
void cpu_codes(const EncodeCase& c, Side side, const std::vector<float>& x, const Conditioning& conditioning,
               std::vector<uint8_t>& codes, std::vector<uint16_t>& scales) {
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
    ASSERT_TRUE(store->write(x.data(), shape.row_elements(), index.data(), c.n, ParallelFor{}, nullptr).ok());
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
        conditioning = storable(conditioning);
    }
    CacheShape shape{c.head_size, c.kv_heads, c.key_bits, c.value_bits, c.page_size, 0};
    shape.n_pages = 2 * ((c.n + c.page_size - 1) / c.page_size) + 1;
    tq_cuda_cache cache = make_cache(shape);
    // Memory that was something else before.
    const Device<uint8_t> pages(tq_cuda_page_bytes(&cache) * static_cast<size_t>(shape.n_pages), 0xa5);
    cache.pages = pages.get();
    const Device<float> mu(conditioning.mu);
    const Device<float> lambda(conditioning.lambda);
    if (c.conditioned) {
        cache.mu = mu.get();
        cache.lambda = lambda.get();
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
    ASSERT_EQ(tq_cuda_encode(&cache, &write, nullptr), TQ_OK) << tq_cuda_last_error();
    const size_t parts = static_cast<size_t>(c.n * c.kv_heads);
    const Device<uint8_t> codes(2 * parts * static_cast<size_t>(c.head_size), 0xee);
    const Device<uint16_t> scales(2 * parts, 0xee);
    ASSERT_EQ(tq_cuda_read(&cache, device_slots.get(), c.n, codes.get(), scales.get(), nullptr, 0, 0, nullptr), TQ_OK);
    TQ_CUDA_OK(cudaDeviceSynchronize());
    const std::vector<uint8_t> got_codes = codes.host();
    const std::vector<uint16_t> got_scales = scales.host();
    for (const Side side : {Side::key, Side::value}) {
        const size_t s = side == Side::key ? 0 : 1;
        std::vector<uint8_t> want_codes(parts * static_cast<size_t>(c.head_size));
        std::vector<uint16_t> want_scales(parts);
        cpu_codes(c, side, rows[s], side == Side::key ? conditioning : Conditioning{}, want_codes, want_scales);
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
    write.type = 7;
    EXPECT_EQ(tq_cuda_encode(&cache, &write, nullptr), TQ_INVALID_ARGUMENT);
}

} // namespace
} // namespace turboquant::cuda_tests
