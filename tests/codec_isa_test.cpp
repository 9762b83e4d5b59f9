// Every instruction set stores the same bytes.
#include "cache/store_impl.h"
#include "codec/codec_tables.h"
#include "codec/kernels.h"
#include "store_testing.h"
#include "turboquant/codec.h"

#include <cstdlib>
#include <cstring>

namespace turboquant {
namespace {

using testing::normals;

TEST(Isa, NamesRoundTrip) {
    for (const Isa isa : {Isa::portable, Isa::avx2, Isa::avxvnni, Isa::avx512, Isa::avx512vbmi, Isa::neon}) {
        Isa parsed = Isa::portable;
        ASSERT_TRUE(parse_isa(isa_name(isa), parsed).ok());
        EXPECT_EQ(parsed, isa);
    }
    Isa parsed = Isa::portable;
    const Status status = parse_isa("sse9", parsed);
    EXPECT_EQ(status.code(), StatusCode::invalid_argument);
    EXPECT_NE(status.message().find("avx512"), std::string::npos) << status.message();
    EXPECT_EQ(available_isas().front(), Isa::portable);
}

#if defined(__x86_64__)
TEST(Isa, FindsWhatTheProcessorHas) {
    const std::vector<Isa>& isas = available_isas();
    EXPECT_EQ(std::count(isas.begin(), isas.end(), Isa::avx2) == 1,
              __builtin_cpu_supports("avx2") != 0 && __builtin_cpu_supports("fma") != 0);
}
#endif

// Run three times by ctest: without TURBOQUANT_ISA, with "portable" and with a name that is none.
TEST(IsaEnvironment, IsObeyedOrRefused) {
    const char* const wanted = std::getenv("TURBOQUANT_ISA");
    Isa isa = Isa::neon;
    const Status status = default_isa(isa);
    std::unique_ptr<Store> store;
    const Status created = Store::create({Side::key, 64, 1, 64}, {}, {}, store);
    Isa parsed = Isa::portable;
    if (wanted == nullptr || *wanted == '\0') {
        ASSERT_TRUE(status.ok());
        EXPECT_EQ(isa, available_isas().back());
        EXPECT_TRUE(created.ok());
    } else if (parse_isa(wanted, parsed).ok()) {
        ASSERT_TRUE(status.ok()) << status.message();
        EXPECT_EQ(isa, parsed);
        EXPECT_EQ(store->impl().kernels, &codec_kernels(parsed));
    } else {
        EXPECT_EQ(status.code(), StatusCode::invalid_argument);
        EXPECT_NE(status.message().find("TURBOQUANT_ISA"), std::string::npos);
        EXPECT_NE(status.message().find(wanted), std::string::npos);
        EXPECT_EQ(created.message(), status.message());
        EXPECT_EQ(store, nullptr);
    }
}

// Inputs of all kinds: normal, heavy-tailed, tiny, huge, constant, sparse, with signed zeros, NaN, infinity.
std::vector<float> input(size_t n, uint32_t seed) {
    std::vector<float> x = normals(n, seed);
    const auto at = [&x, n](uint32_t i) -> float& { return x[i % n]; };
    switch (seed % 10) {
    case 1:
        for (float& v : x) {
            v = v * v * v * 100;
        }
        break;
    case 2:
        for (float& v : x) {
            v *= 1e-7F;
        }
        break;
    case 3:
        for (float& v : x) {
            v *= 1e30F;
        }
        break;
    case 4: std::fill(x.begin(), x.end(), 0.37F); break;
    case 5:
        std::fill(x.begin(), x.end(), -0.0F);
        at(seed) = 5;
        at(seed * 3) = -1e-40F;
        break;
    case 6: at(seed) = HUGE_VALF; break;
    case 7: at(seed) = NAN; break;
    case 8:
        at(seed) = 65519;
        at(seed * 7) = -7e4F;
        break;
    default: break;
    }
    return x;
}

TEST(IsaKernels, SameBytesEverywhere) {
    const CodecKernels& reference = codec_kernels(Isa::portable);
    for (const Isa isa : available_isas()) {
        const CodecKernels& kernels = codec_kernels(isa);
        for (int n = 4; n <= 1024; n += 4) {
            if (largest_block(n) != n) {
                continue;
            }
            const auto padded = static_cast<size_t>(round_up(n, kVectorPadding));
            for (uint32_t seed = 0; seed < 40; ++seed) {
                std::vector<float> x = input(static_cast<size_t>(n), seed);
                x.resize(padded, 0.0F);
                std::vector<uint16_t> h[2] = {std::vector<uint16_t>(padded), std::vector<uint16_t>(padded)};
                const uint32_t top = reference.round_to_half(x.data(), static_cast<int>(padded), h[0].data());
                ASSERT_EQ(kernels.round_to_half(x.data(), static_cast<int>(padded), h[1].data()), top);
                if (top < 0x7f800000U) {
                    ASSERT_EQ(h[0], h[1]) << isa_name(isa) << ' ' << n << ' ' << seed;
                    for (size_t i = 0; i < padded; ++i) {
                        ASSERT_EQ(h[0][i], to_half(std::clamp(x[i], -65504.0F, 65504.0F)));
                    }
                } else {
                    std::fill(h[0].begin(), h[0].end(), uint16_t{0});
                }
                const std::vector<float> mu = normals(padded, seed + 1000);
                const std::vector<float> factor = normals(padded, seed + 2000);
                std::vector<float> y[2] = {std::vector<float>(padded, 9.0F), std::vector<float>(padded, 9.0F)};
                reference.condition(h[0].data(), mu.data(), factor.data(), n, y[0].data());
                kernels.condition(h[0].data(), mu.data(), factor.data(), n, y[1].data());
                ASSERT_EQ(std::memcmp(y[0].data(), y[1].data(), padded * sizeof(float)), 0)
                    << isa_name(isa) << ' ' << n;
                for (const bool transposed : {true, false}) {
                    reference.hadamard(y[0].data(), n, transposed);
                    kernels.hadamard(y[1].data(), n, transposed);
                    ASSERT_EQ(std::memcmp(y[0].data(), y[1].data(), padded * sizeof(float)), 0)
                        << isa_name(isa) << ' ' << n;
                }
                // Both what a store would encode and the raw input.
                for (const float* const v : {y[0].data(), x.data()}) {
                    for (const int bits : testing::kCodecBits) {
                        for (const ScaleRule rule : {ScaleRule::unbiased, ScaleRule::matched, ScaleRule::mmse}) {
                            uint16_t scale[2] = {1, 2};
                            std::vector<uint8_t> codes[2] = {std::vector<uint8_t>(static_cast<size_t>(n), 1),
                                                             std::vector<uint8_t>(static_cast<size_t>(n), 2)};
                            const Codebook& book = *find_codebook(bits);
                            const EncodeNote note =
                                encode_block(v, n, book, rule, codes[0].data(), &scale[0], Isa::portable);
                            ASSERT_EQ(encode_block(v, n, book, rule, codes[1].data(), &scale[1], isa), note);
                            ASSERT_EQ(scale[0], scale[1]) << isa_name(isa) << ' ' << n << ' ' << bits << ' ' << seed;
                            ASSERT_EQ(codes[0], codes[1]) << isa_name(isa) << ' ' << n << ' ' << bits << ' ' << seed;
                        }
                    }
                }
            }
        }
    }
}

// Blocks encoded together are encoded as each alone, step by step.
TEST(IsaKernels, GroupsOfRowsAreLikeSingleSteps) {
    const CodecKernels& reference = codec_kernels(Isa::portable);
    for (const Isa isa : available_isas()) {
        const CodecKernels& kernels = codec_kernels(isa);
        for (const int n : {4, 16, 32, 64, 80, 96, 128, 256, 512, 768, 1024}) {
            const auto padded = static_cast<size_t>(round_up(n, kVectorPadding));
            for (const int count : {1, 2, 7, 8, 11}) {
                for (const int bits : testing::kCodecBits) {
                    for (const KernelRule rule : {KernelRule::unbiased, KernelRule::matched, KernelRule::mmse}) {
                        const auto rows = static_cast<size_t>(count);
                        std::vector<uint16_t> h(rows * padded, 0);
                        const std::vector<float> mu = normals(padded, 3);
                        const std::vector<float> factor = normals(padded, 4);
                        std::vector<uint8_t> codes(rows * padded, 1);
                        std::vector<uint16_t> scales(rows, 1);
                        std::vector<EncodeItem> items(rows);
                        for (size_t r = 0; r < rows; ++r) {
                            // Every kind of input there is: groups mix blocks that need care with ordinary ones.
                            std::vector<float> x = input(static_cast<size_t>(n), static_cast<uint32_t>(r) + 11);
                            x.resize(padded, 0.0F);
                            uint16_t* const at = h.data() + r * padded;
                            if (reference.round_to_half(x.data(), static_cast<int>(padded), at) >= 0x7f800000U) {
                                std::fill_n(at, padded, uint16_t{0});
                            }
                            items[r] = {at, mu.data(), factor.data(), codes.data() + r * padded, &scales[r], 9};
                        }
                        // Nothing, a tiny row.
                        std::fill_n(h.data() + (rows / 2) * padded, padded, uint16_t{0});
                        kernels.encode_rows(items.data(), count, n, encode_table(bits), rule);
                        for (size_t r = 0; r < rows; ++r) {
                            std::vector<float> y(padded);
                            std::vector<uint8_t> expected(padded, 2);
                            uint16_t scale = 2;
                            reference.condition(items[r].h, mu.data(), factor.data(), n, y.data());
                            reference.hadamard(y.data(), n, false);
                            const uint8_t note =
                                reference.encode(y.data(), n, encode_table(bits), rule, expected.data(), &scale);
                            ASSERT_EQ(items[r].note, note);
                            ASSERT_EQ(scales[r], scale)
                                << isa_name(isa) << ' ' << n << ' ' << bits << " row " << r << " of " << count;
                            ASSERT_EQ(std::memcmp(items[r].codes, expected.data(), static_cast<size_t>(n)), 0)
                                << isa_name(isa) << ' ' << n << ' ' << bits << " row " << r << " of " << count;
                        }
                    }
                }
            }
        }
    }
}

// The bytes of rows that were stored by an earlier version: what a saved cache holds must stay what it is.
TEST(IsaKernels, BytesAreThoseOfEarlierVersions) {
    uint64_t hash = 0xcbf29ce484222325U;
    std::mt19937 generator(5);
    for (const Side side : {Side::key, Side::value}) {
        for (const int bits : testing::kCodecBits) {
            for (const int head_size : {16, 64, 80, 128, 192, 256, 576}) {
                std::unique_ptr<Store> store;
                ASSERT_TRUE(Store::create({side, head_size, 2, 70}, {bits, 0, 0}, {}, store).ok());
                std::vector<float> x(static_cast<size_t>(store->shape().row_elements()));
                std::vector<uint8_t> row(store->native_row_bytes());
                for (int64_t r = 0; r < 70; ++r) {
                    for (float& v : x) { // nearly normal, exact in fp32 with any compiler
                        v = 0;
                        for (int i = 0; i < 4; ++i) {
                            v += static_cast<float>(static_cast<int>(generator() >> 16) - 32768) / 32768;
                        }
                    }
                    ASSERT_TRUE(store->write(x.data(), 0, &r, 1, {}, nullptr).ok());
                    store->read_native(r, row.data());
                    for (const uint8_t byte : row) {
                        hash = (hash ^ byte) * 0x100000001b3U;
                    }
                }
            }
        }
    }
    EXPECT_EQ(hash, 0x98f0bc9c5540b998U);
}

// Each kernel's writes against layout.h's own map of the fields.
TEST(IsaKernels, PlanesAreTheLayouts) {
    for (const Isa isa : available_isas()) {
        const CodecKernels& kernels = codec_kernels(isa);
        for (const Side side : {Side::key, Side::value}) {
            for (const int bits : testing::kCodecBits) {
                for (const int head_size : {4, 20, 64, 80, 112}) {
                    const TileLayout t = make_tile_layout(side, bits, head_size);
                    std::vector<uint8_t> tile(t.tile_bytes, 0);
                    std::vector<uint8_t> expected(t.tile_bytes, 0);
                    std::mt19937 generator(static_cast<uint32_t>(bits * head_size));
                    for (int write = 0; write < 300; ++write) { // rows come back: old fields must go
                        const int row = static_cast<int>(generator() % kTileRows);
                        std::vector<uint8_t> codes(static_cast<size_t>(round_up(head_size, 32)), 0);
                        for (int c = 0; c < head_size; ++c) {
                            codes[static_cast<size_t>(c)] = static_cast<uint8_t>(generator() & ((1U << bits) - 1U));
                        }
                        for (int p = 0; p < t.n_planes; ++p) {
                            const Plane& plane = t.planes[p];
                            const int elements = side == Side::key ? plane.padded_channels : kTileRows;
                            const PlaneShape shape = {plane.width, plane.shift, elements * plane.width / 32};
                            uint8_t* const at = tile.data() + plane.offset;
                            side == Side::key
                                ? kernels.put_key_row(at, shape, row, codes.data())
                                : kernels.put_value_row(at, shape, plane.padded_channels, row, codes.data());
                            for (int c = 0; c < head_size; ++c) {
                                const FieldPosition f = field_position(side, plane, row, c);
                                const unsigned mask = (1U << plane.width) - 1U;
                                const unsigned field =
                                    static_cast<unsigned>(codes[static_cast<size_t>(c)]) >> plane.shift & mask;
                                uint8_t& byte = expected[plane.offset + f.byte];
                                byte = static_cast<uint8_t>((byte & ~(mask << f.bit)) | field << f.bit);
                            }
                        }
                        ASSERT_EQ(tile, expected) << isa_name(isa) << ' ' << bits << ' ' << head_size << ' ' << row;
                    }
                }
            }
        }
    }
}

} // namespace
} // namespace turboquant
