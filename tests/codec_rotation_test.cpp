// The rotation: which blocks, which signs, orthonormal, inverse.
#include "codec/codec_tables.h"
#include "codec/hadamard_matrix.h"
#include "store_testing.h"
#include "turboquant/codec.h"

namespace turboquant {
namespace {

using testing::normals;

std::vector<int> sizes_of(int head_size) {
    Rotation r;
    EXPECT_TRUE(Rotation::create(head_size, r).ok());
    std::vector<int> sizes;
    for (const RotationBlock& b : r.blocks()) {
        sizes.push_back(b.size);
    }
    return sizes;
}

TEST(Rotation, BlocksAreTheLargestFirst) {
    for (const int one : {4, 8, 12, 16, 20, 32, 64, 80, 96, 128, 192, 256, 320, 512, 1024}) {
        EXPECT_EQ(sizes_of(one), std::vector<int>{one});
    }
    EXPECT_EQ(sizes_of(576), (std::vector<int>{512, 64}));
    EXPECT_EQ(sizes_of(112), (std::vector<int>{96, 16}));
    EXPECT_EQ(sizes_of(28), (std::vector<int>{24, 4}));
    EXPECT_EQ(sizes_of(1020), (std::vector<int>{768, 192, 48, 12}));
}

TEST(Rotation, RefusesSizesItCannotServe) {
    Rotation r;
    for (const int bad : {-4, 0, 1, 2, 3, 6, 66, 1028}) {
        const Status status = Rotation::create(bad, r);
        EXPECT_EQ(status.code(), StatusCode::invalid_argument) << bad;
        EXPECT_NE(status.message().find(std::to_string(bad)), std::string::npos);
    }
}

TEST(Rotation, EverySizeIsCoveredOnce) {
    for (int head_size = 4; head_size <= 1024; head_size += 4) {
        Rotation r;
        ASSERT_TRUE(Rotation::create(head_size, r).ok());
        int at = 0;
        for (const RotationBlock& b : r.blocks()) {
            EXPECT_EQ(b.offset, at);
            at += b.size;
        }
        EXPECT_EQ(at, head_size);
        EXPECT_EQ(r.signs().size(), static_cast<size_t>(head_size));
    }
}

// Stored caches depend on these for ever.
TEST(Rotation, SignsArePinned) {
    const auto signs = [](int size, int n) {
        std::string s;
        for (int i = 0; i < n; ++i) {
            s += rotation_sign(size, i) < 0 ? '-' : '+';
        }
        return s;
    };
    EXPECT_EQ(signs(64, 32), "++++-+++++-----+-+++--++--++-+-+");
    EXPECT_EQ(signs(80, 32), "+-+-+++-++-++---+++----+++-+--++");
    EXPECT_EQ(signs(128, 32), "---+-+++++--+---++-+--+++-+++---");
    Rotation r;
    ASSERT_TRUE(Rotation::create(576, r).ok());
    for (int i = 0; i < 64; ++i) { // the second block's signs are those of its own size and place
        EXPECT_EQ(r.signs()[static_cast<size_t>(512 + i)], rotation_sign(64, i));
    }
}

template <int N>
void expect_hadamard(const HadamardMatrix<N>& h) {
    bool symmetric = true;
    for (int a = 0; a < N; ++a) {
        for (int b = 0; b < N; ++b) {
            float rows = 0;
            for (int k = 0; k < N; ++k) {
                rows += h.at[a][k] * h.at[b][k];
            }
            EXPECT_EQ(rows, a == b ? static_cast<float>(N) : 0.0F) << N << ": " << a << ' ' << b;
            EXPECT_EQ(std::abs(h.at[a][b]), 1.0F);
            symmetric = symmetric && h.at[a][b] == h.at[b][a];
        }
    }
    EXPECT_FALSE(symmetric) << "the tests of the inverse would not see a missing transpose";
}

TEST(Rotation, PaleyMatricesAreHadamard) {
    expect_hadamard(kHadamard12);
    expect_hadamard(kHadamard20);
}

// The fast transform against the matrix it stands for, H_order x H_(2^k), entry by entry.
TEST(Rotation, FastTransformIsTheMatrix) {
    for (const int n : {4, 8, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192}) {
        Rotation r;
        ASSERT_TRUE(Rotation::create(n, r).ok());
        int odd = n;
        while (odd % 2 == 0) {
            odd /= 2;
        }
        const int order = odd == 1 ? 1 : 4 * odd;
        const int length = n / order;
        for (int j = 0; j < n; ++j) {
            std::vector<float> x(static_cast<size_t>(n));
            std::vector<float> y(static_cast<size_t>(n));
            x[static_cast<size_t>(j)] = 1;
            r.forward(x.data(), y.data());
            for (int i = 0; i < n; ++i) {
                const float outer = order == 12   ? kHadamard12.at[i / length][j / length]
                                    : order == 20 ? kHadamard20.at[i / length][j / length]
                                                  : 1.0F;
                const float inner =
                    __builtin_parity(static_cast<unsigned>(i % length & j % length)) != 0 ? -1.0F : 1.0F;
                const float expected =
                    outer * inner * r.signs()[static_cast<size_t>(j)] / std::sqrt(static_cast<float>(n));
                ASSERT_NEAR(y[static_cast<size_t>(i)], expected, 1e-6F) << n << ": " << i << ' ' << j;
            }
        }
    }
}

TEST(Rotation, IsOrthonormalForAllSizes) {
    for (int n = 4; n <= 1024; n += 4) {
        Rotation r;
        ASSERT_TRUE(Rotation::create(n, r).ok());
        const auto size = static_cast<size_t>(n);
        const std::vector<float> a = normals(size, 1);
        const std::vector<float> b = normals(size, 2);
        std::vector<float> ra(size);
        std::vector<float> rb(size);
        std::vector<float> back(size);
        r.forward(a.data(), ra.data());
        r.forward(b.data(), rb.data());
        const double norm2 = testing::dot(a.data(), a.data(), size);
        EXPECT_NEAR(testing::dot(ra.data(), ra.data(), size) / norm2, 1, 1e-5) << n;
        EXPECT_NEAR(testing::dot(ra.data(), rb.data(), size), testing::dot(a.data(), b.data(), size), 1e-5 * norm2)
            << n;
        r.inverse(ra.data(), back.data());
        EXPECT_LT(testing::squared_distance(a.data(), back.data(), size), 1e-10 * norm2) << n;
        r.inverse(ra.data(), ra.data()); // in place
        EXPECT_EQ(ra, back) << n;
    }
}

TEST(Rotation, BlocksDoNotMix) {
    Rotation r;
    ASSERT_TRUE(Rotation::create(576, r).ok());
    std::vector<float> x(576, 0.0F);
    std::vector<float> y(576);
    std::fill(x.begin() + 512, x.end(), 3.0F);
    r.forward(x.data(), y.data());
    for (size_t i = 0; i < 512; ++i) {
        EXPECT_EQ(y[i], 0.0F);
    }
}

// A constant vector must not end in one coordinate: that is what the signs are for.
TEST(Rotation, SpreadsConstantVectors) {
    for (const int n : testing::kHeadSizes) {
        Rotation r;
        ASSERT_TRUE(Rotation::create(n, r).ok());
        std::vector<float> x(static_cast<size_t>(n), 1.0F);
        r.forward(x.data(), x.data());
        const RotationBlock block = r.blocks()[0];
        for (int i = 0; i < block.size; ++i) {
            EXPECT_LT(std::abs(x[static_cast<size_t>(i)]), 4.5F) << n;
        }
    }
}

} // namespace
} // namespace turboquant
