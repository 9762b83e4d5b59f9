// Profile files: round trips, refusals, replacement in one step.
#include "conditioning/bytes.h"
#include "conditioning_testing.h"
#include "turboquant/profile.h"

#include <gtest/gtest.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>

namespace turboquant {
namespace {

using testing::equal;
using testing::random_conditioning;

Profile make_profile(unsigned seed) {
    std::mt19937 random(seed);
    Profile p;
    p.model = "a model";
    p.text = "built-in, 2048 tokens";
    p.bits = 4.25;
    p.layers.push_back({0, 8, 2, random_conditioning(random, 8, 2), 5, 3});
    p.layers.push_back({3, 4, 1, {}, 16, 0});
    p.layers.push_back({7, 8, 1, random_conditioning(random, 8, 1), 0, 0});
    return p;
}

// Makes the checksum right, as a program gone wrong might.
void sign(std::vector<uint8_t>& bytes) {
    put_at(bytes.data() + 12, crc32(crc32(0, bytes.data(), 12), bytes.data() + 16, bytes.size() - 16), 4);
}

bool equal(const Profile& a, const Profile& b) {
    bool same = a.model == b.model && a.text == b.text && a.bits == b.bits && a.layers.size() == b.layers.size();
    for (size_t i = 0; same && i < a.layers.size(); ++i) {
        const LayerProfile& x = a.layers[i];
        const LayerProfile& y = b.layers[i];
        same = x.layer == y.layer && x.head_size == y.head_size && x.kv_heads == y.kv_heads &&
               x.key_bits == y.key_bits && x.value_bits == y.value_bits && equal(x.keys, y.keys);
    }
    return same;
}

class ProfileFile : public ::testing::Test {
protected:
    void SetUp() override {
        folder_ = std::filesystem::path(::testing::TempDir()) /
                  ("tq_profile_" + std::to_string(std::random_device{}()) + "_" +
                   ::testing::UnitTest::GetInstance()->current_test_info()->name());
        std::filesystem::create_directory(folder_);
    }
    void TearDown() override { std::filesystem::remove_all(folder_); }
    std::string path(const std::string& name) const { return (folder_ / name).string(); }
    size_t n_files() const {
        size_t n = 0;
        for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder_)) {
            ++n;
        }
        return n;
    }
    void expect_one_line(const Status& status, const std::string& with) const {
        EXPECT_FALSE(status.ok());
        EXPECT_EQ(status.message().find('\n'), std::string::npos);
        EXPECT_NE(status.message().find(with), std::string::npos) << status.message();
    }
    std::filesystem::path folder_;
};

TEST_F(ProfileFile, ComesBackAsItWas) {
    const Profile p = make_profile(1);
    ASSERT_TRUE(write_profile(path("p.tqp"), p).ok());
    Profile back;
    ASSERT_TRUE(read_profile(path("p.tqp"), back).ok());
    EXPECT_TRUE(equal(back, p));
    EXPECT_TRUE(back.has_bits());
    ASSERT_NE(back.find(3), nullptr);
    EXPECT_EQ(back.find(3)->key_bits, 16);
    EXPECT_EQ(back.find(1), nullptr);
    EXPECT_EQ(back.find(8), nullptr);
    Profile none;
    ASSERT_TRUE(write_profile(path("none.tqp"), none).ok());
    ASSERT_TRUE(read_profile(path("none.tqp"), back).ok());
    EXPECT_TRUE(back.layers.empty());
    EXPECT_FALSE(back.has_bits());
}

TEST_F(ProfileFile, EveryDamageIsRefusedAndNothingIsChanged) {
    const Profile before = make_profile(2);
    const std::vector<uint8_t> bytes = serialise_profile(make_profile(3));
    for (size_t i = 0; i < bytes.size(); ++i) {
        for (const int flip : {1, 0x80, 0xff}) {
            std::vector<uint8_t> bad = bytes;
            bad[i] = static_cast<uint8_t>(bad[i] ^ flip);
            Profile out = before;
            EXPECT_FALSE(parse_profile(bad, out).ok()) << "byte " << i << " ^ " << flip;
            EXPECT_TRUE(equal(out, before));
        }
    }
    for (size_t n = 0; n < bytes.size(); ++n) {
        Profile out;
        EXPECT_FALSE(parse_profile({bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(n)}, out).ok()) << n;
    }
    std::vector<uint8_t> longer = bytes;
    longer.push_back(0);
    Profile out;
    EXPECT_FALSE(parse_profile(longer, out).ok());
    sign(longer);
    EXPECT_FALSE(parse_profile(longer, out).ok()) << "bytes after the last layer";
}

TEST_F(ProfileFile, NonsenseWithARightChecksumIsRefusedOrSound) {
    std::mt19937 random(8);
    const std::vector<uint8_t> bytes = serialise_profile(make_profile(9));
    int n_read = 0;
    for (int round = 0; round < 20000; ++round) {
        std::vector<uint8_t> bad = bytes;
        for (unsigned k = random() % 4; k < 4; ++k) {
            bad[random() % bad.size()] = static_cast<uint8_t>(random());
        }
        bad.resize(bad.size() - (random() % 4 == 0 ? random() % bad.size() : 0));
        if (bad.size() >= 16) {
            sign(bad);
        }
        Profile out;
        if (parse_profile(bad, out).ok()) {
            ++n_read;
            for (const LayerProfile& l : out.layers) {
                EXPECT_TRUE(check_conditioning(l.keys, l.head_size, l.kv_heads).ok());
            }
        }
    }
    EXPECT_GT(n_read, 0) << "texts and bits may be anything";
}

TEST_F(ProfileFile, WhatCannotBeReadIsNeverWritten) {
    Profile p = make_profile(4);
    ASSERT_TRUE(write_profile(path("p.tqp"), p).ok());
    Profile wrong = p;
    wrong.layers[0].kv_heads = 3;
    expect_one_line(write_profile(path("p.tqp"), wrong), path("p.tqp"));
    wrong = p;
    wrong.layers[1].layer = 9; // out of order
    expect_one_line(write_profile(path("p.tqp"), wrong), "order");
    wrong = p;
    wrong.layers[1].layer = 0; // twice
    expect_one_line(write_profile(path("p.tqp"), wrong), "order");
    wrong = p;
    wrong.layers[2].value_bits = 7;
    expect_one_line(write_profile(path("p.tqp"), wrong), "7 bits");
    Profile back;
    ASSERT_TRUE(read_profile(path("p.tqp"), back).ok());
    EXPECT_TRUE(equal(back, p)) << "the old file stays";
    EXPECT_EQ(n_files(), 1U) << "no temporary file stays behind";
}

TEST_F(ProfileFile, UnusablePathsAreOneLine) {
    Profile out;
    expect_one_line(read_profile(path("no/such/file.tqp"), out), "no/such/file.tqp");
    expect_one_line(read_profile(folder_.string(), out), "tq tune");
    expect_one_line(write_profile(path("no/such/file.tqp"), make_profile(5)), "no/such/file.tqp");
    expect_one_line(write_profile(folder_.string(), make_profile(5)), folder_.string());
    std::ofstream(path("text")) << "this is no profile, whatever its name says";
    expect_one_line(read_profile(path("text"), out), "not a TurboQuant profile");
    std::ofstream(path("empty")).flush();
    expect_one_line(read_profile(path("empty"), out), "not a TurboQuant profile");
    std::vector<uint8_t> bytes = serialise_profile(make_profile(5));
    bytes[4] = 2;
    std::ofstream(path("next"), std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    expect_one_line(read_profile(path("next"), out), "version 2");
}

TEST_F(ProfileFile, ReadersNeverSeeHalfAFile) {
    const Profile a = make_profile(6);
    const Profile b = make_profile(7);
    ASSERT_TRUE(write_profile(path("p.tqp"), a).ok());
    std::atomic<bool> done = false;
    int n_read = 0;
    std::thread writer([&] {
        for (int i = 0; i < 200; ++i) {
            EXPECT_TRUE(write_profile(path("p.tqp"), i % 2 == 0 ? b : a).ok());
        }
        done = true;
    });
    while (!done) {
        Profile out;
        const Status status = read_profile(path("p.tqp"), out);
        EXPECT_TRUE(status.ok()) << status.message();
        EXPECT_TRUE(equal(out, a) || equal(out, b));
        ++n_read;
    }
    writer.join();
    EXPECT_GT(n_read, 0);
    EXPECT_EQ(n_files(), 1U);
}

} // namespace
} // namespace turboquant
