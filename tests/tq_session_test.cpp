// Sessions on disk without a model: the file's format against every kind of damage, the folder that keeps within its limit.
#include "llm/session_archive.h"
#include "llm/session_folder.h"
#include "llm/user_cache.h"
#include "serve/engine/folder_store.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <thread>

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

namespace {

using namespace turboquant;
using namespace turboquant::llm;
namespace fs = std::filesystem;
using Bytes = std::vector<uint8_t>;
using Tokens = std::vector<Token>;

const SessionOrigin kOrigin{"model A, 1-2", "4/4 bits, window 32, sinks 4", "0.5, state 3"};

// As the plug-in's: rows of `row` bytes, of which `coded` are codes and the rest zeros.
Bytes state_of(size_t rows, uint32_t seed, size_t coded = 40, size_t row = 128) {
    std::mt19937 random(seed);
    Bytes state(rows * row);
    for (size_t i = 0; i < state.size(); ++i) {
        state[i] = i % row < coded ? static_cast<uint8_t>(random()) : 0;
    }
    return state;
}

Tokens tokens_of(int n, Token first = 0) {
    Tokens tokens(static_cast<size_t>(n));
    for (int i = 0; i < n; ++i) {
        tokens[static_cast<size_t>(i)] = first + i;
    }
    return tokens;
}

Bytes bytes_of(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

void put_bytes(const fs::path& path, const Bytes& bytes) {
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
}

class SessionTest : public testing::Test {
protected:
    void SetUp() override {
        root_ = fs::temp_directory_path() / ("tq_session_" + std::to_string(getpid()));
        fs::remove_all(root_);
        fs::create_directories(root_);
        path_ = root_ / "a.tqs";
    }
    void TearDown() override { fs::remove_all(root_); }

    // What reading the file says; empty: it could be read whole.
    std::string refusal(const fs::path& path) const {
        try {
            read_session_state(path, read_session_head(path));
            return {};
        } catch (const DamagedSession& error) {
            return error.what();
        }
    }

    fs::path root_; // NOLINT(readability-identifier-naming): as private members
    fs::path path_; // NOLINT(readability-identifier-naming)
};

class ArchiveTest : public SessionTest {};
class FolderTest : public SessionTest {
protected:
    SessionFolder open(int64_t limit = 1 << 30, const SessionOrigin& origin = kOrigin) {
        return {root_ / "sessions", origin, limit, [this](const std::string& line) { notices_.push_back(line); }};
    }
    size_t files() const {
        return static_cast<size_t>(std::distance(fs::directory_iterator(root_ / "sessions"), fs::directory_iterator()));
    }
    std::vector<std::string> notices_; // NOLINT(readability-identifier-naming)
};

TEST_F(ArchiveTest, ComesBackAsItWas) {
    const Tokens tokens = {5, 0, 31999, 7};
    const Bytes state = state_of(1000, 1);
    const std::string note("a note with \"quotes\", \n and \xc3\xa9");
    const uint64_t bytes = write_session(path_, kOrigin, note, tokens, state);
    EXPECT_EQ(bytes, fs::file_size(path_));
    const SessionHead head = read_session_head(path_);
    EXPECT_EQ(head.tokens, tokens);
    EXPECT_EQ(head.note, note);
    EXPECT_EQ(head.state_bytes, state.size());
    EXPECT_EQ(kOrigin.obstacle(head.origin), "");
    EXPECT_EQ(read_session_state(path_, head), state);
}

TEST_F(ArchiveTest, OfNothing) {
    write_session(path_, kOrigin, "", {}, {});
    const SessionHead head = read_session_head(path_);
    EXPECT_TRUE(head.tokens.empty());
    EXPECT_TRUE(read_session_state(path_, head).empty());
}

TEST_F(ArchiveTest, PaddingCostsNothing) {
    const Bytes state = state_of(20000, 2);
    const uint64_t bytes = write_session(path_, kOrigin, "", {}, state);
    EXPECT_LT(bytes, state.size() * 42 / 128); // random codes do not pack; 40 of 128 bytes are codes
    EXPECT_GT(bytes, state.size() * 40 / 128);
}

TEST_F(ArchiveTest, IsItsOwnersAndLeavesNothingBeside) {
    write_session(path_, kOrigin, "", {}, state_of(10, 3));
    write_session(path_, kOrigin, "second", {}, state_of(10, 4));
    struct stat info = {};
    ASSERT_EQ(::stat(path_.c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 0777, 0600U);
    EXPECT_EQ(std::distance(fs::directory_iterator(root_), fs::directory_iterator()), 1);
    EXPECT_EQ(read_session_head(path_).note, "second");
}

TEST_F(ArchiveTest, EveryByteIsChecked) {
    write_session(path_, kOrigin, "note", tokens_of(20), state_of(6, 5));
    const Bytes good = bytes_of(path_);
    ASSERT_EQ(refusal(path_), "");
    for (size_t i = 0; i < good.size(); ++i) {
        for (const int bit : {0, 3, 7}) {
            Bytes bad = good;
            bad[i] = static_cast<uint8_t>(bad[i] ^ (1U << bit));
            put_bytes(path_, bad);
            const std::string why = refusal(path_);
            ASSERT_NE(why, "") << "byte " << i << " of " << good.size() << ", bit " << bit;
            ASSERT_EQ(why.rfind(path_.string() + ": ", 0), 0U) << why;
            ASSERT_EQ(why.find('\n'), std::string::npos) << why;
        }
    }
}

TEST_F(ArchiveTest, EveryLengthIsChecked) {
    write_session(path_, kOrigin, "note", tokens_of(20), state_of(6, 6));
    const Bytes good = bytes_of(path_);
    for (size_t n = 0; n < good.size(); ++n) {
        put_bytes(path_, Bytes(good.begin(), good.begin() + static_cast<ptrdiff_t>(n)));
        ASSERT_NE(refusal(path_), "") << n << " of " << good.size();
    }
    Bytes longer = good;
    longer.push_back(0);
    put_bytes(path_, longer);
    EXPECT_NE(refusal(path_), "");
}

TEST_F(ArchiveTest, RegionsAreNamed) {
    write_session(path_, kOrigin, "note", tokens_of(20), state_of(6, 7));
    const Bytes good = bytes_of(path_);
    const auto with = [&](size_t at, uint8_t value) {
        Bytes bad = good;
        bad[at] = value;
        put_bytes(path_, bad);
        return refusal(path_);
    };
    EXPECT_NE(with(0, 'X').find("not a file that tq saved"), std::string::npos);
    EXPECT_NE(with(8, 9).find("format version 9"), std::string::npos);
    EXPECT_NE(with(14, 255).find("longer than the file"), std::string::npos);
    EXPECT_NE(with(good.size() - 1, static_cast<uint8_t>(good.back() + 1)).find("checksum"), std::string::npos);
    put_bytes(path_, {'h', 'e', 'l', 'l', 'o'});
    EXPECT_NE(refusal(path_).find("not a file that tq saved"), std::string::npos);
}

TEST_F(ArchiveTest, WhatIsNoFileIsRefused) {
    EXPECT_THROW(read_session_head(root_ / "none"), Error);
    EXPECT_THROW(read_session_head(root_), DamagedSession); // a folder
    ASSERT_EQ(::mkfifo(path_.c_str(), 0600), 0);
    EXPECT_THROW(read_session_head(path_), DamagedSession); // would block
}

// A file that is whole by its checksums but was not written by us must not make us take all memory.
TEST_F(ArchiveTest, ClaimsAreBounded) {
    write_session(path_, kOrigin, "", {}, state_of(6, 8));
    Bytes bytes = bytes_of(path_);
    const auto seal = [&] {
        uint64_t head_bytes = 0;
        std::memcpy(&head_bytes, bytes.data() + 12, 4);
        uint64_t hash = hash_bytes(bytes.data(), 48);
        hash = hash_bytes(bytes.data() + 56, head_bytes, hash);
        hash = hash_bytes(bytes.data() + 56 + head_bytes, 0, hash);
        std::memcpy(bytes.data() + 48, &hash, 8);
        put_bytes(path_, bytes);
    };
    seal();
    ASSERT_EQ(refusal(path_), "");
    bytes[24 + 6] = 1; // 2^48 bytes of state
    seal();
    EXPECT_NE(refusal(path_).find("more than it can hold"), std::string::npos);
    bytes[24 + 6] = 0;
    bytes[24] = static_cast<uint8_t>(bytes[24] + 1);
    seal();
    EXPECT_NE(refusal(path_).find("not as long as it says"), std::string::npos);
}

TEST_F(ArchiveTest, OriginsDiffer) {
    SessionOrigin other = kOrigin;
    other.model = "model B";
    EXPECT_NE(kOrigin.obstacle(other).find("another model"), std::string::npos);
    other = kOrigin;
    other.kv = "f16";
    EXPECT_NE(kOrigin.obstacle(other).find("another cache, f16"), std::string::npos);
    other = kOrigin;
    other.host = "0.6, state 3";
    EXPECT_NE(kOrigin.obstacle(other).find("0.6"), std::string::npos);
}

TEST_F(ArchiveTest, AFailureCostsNothing) {
    const auto fails = [&](const fs::path& path) {
        try {
            write_session(path, kOrigin, "", {}, {});
        } catch (const Error& error) {
            return std::string(error.what()).rfind(path.string() + ": cannot be written: ", 0) == 0;
        }
        return false;
    };
    EXPECT_TRUE(fails(root_ / "none" / "a.tqs"));
    fs::create_directories(root_ / "folder" / "full");
    EXPECT_TRUE(fails(root_ / "folder"));
    EXPECT_EQ(std::distance(fs::directory_iterator(root_), fs::directory_iterator()), 1); // no .part
}

// ---- the folder ----------------------------------------------------------------------------------------------------

TEST_F(FolderTest, IsItsOwnersOnly) {
    open();
    struct stat info = {};
    ASSERT_EQ(::stat((root_ / "sessions").c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 0777, 0700U);
    fs::permissions(root_ / "sessions", fs::perms::group_read, fs::perm_options::add);
    EXPECT_THROW(open(), Error);
    put_bytes(root_ / "file", {1});
    EXPECT_THROW(SessionFolder(root_ / "file", kOrigin, 1, {}), Error);
    EXPECT_THROW(SessionFolder(root_ / "file" / "below", kOrigin, 1, {}), Error);
}

TEST_F(FolderTest, FindsTheLongestBeginningAfterARestart) {
    const Bytes state = state_of(50, 1);
    {
        SessionFolder folder = open();
        Tokens other = tokens_of(100);
        other.resize(60);
        other.resize(100, 7777); // shares 60 tokens with the next
        EXPECT_TRUE(folder.save(other, state_of(50, 2)));
        EXPECT_TRUE(folder.save(tokens_of(100), state));
        EXPECT_TRUE(folder.save(tokens_of(100, 500), state_of(50, 3)));
    }
    SessionFolder folder = open();
    EXPECT_EQ(folder.contents().files, 3);
    const auto found = folder.find(tokens_of(120), 0);
    ASSERT_TRUE(found);
    EXPECT_EQ(found->common, 100);
    EXPECT_EQ(found->tokens, 100);
    const auto loaded = folder.load(found->name);
    ASSERT_TRUE(loaded);
    EXPECT_EQ(loaded->tokens, tokens_of(100));
    EXPECT_EQ(loaded->state, state);
    EXPECT_FALSE(folder.find(tokens_of(50, 9000), 0));
    EXPECT_TRUE(notices_.empty());
}

TEST_F(FolderTest, LoadsOnlyWhatIsWorthIt) {
    SessionFolder folder = open();
    folder.save(tokens_of(1000), state_of(50, 1));
    EXPECT_FALSE(folder.find(tokens_of(90), 0)) << "loading 1000 tokens for 90";
    EXPECT_TRUE(folder.find(tokens_of(200), 0));
    EXPECT_FALSE(folder.find(tokens_of(200), 150)) << "150 of them are in a cache already";
    EXPECT_FALSE(folder.find(tokens_of(1000), 1000));
}

TEST_F(FolderTest, AContinuedSessionTakesItsBeginningsPlace) {
    SessionFolder folder = open();
    folder.save(tokens_of(50), state_of(10, 1));
    folder.save(tokens_of(50, 300), state_of(10, 2));
    folder.save(tokens_of(80), state_of(20, 3));
    EXPECT_EQ(files(), 2U);
    EXPECT_EQ(folder.contents().files, 2);
    EXPECT_EQ(folder.find(tokens_of(80), 0)->common, 80);
    EXPECT_TRUE(folder.holds(tokens_of(80)));
    EXPECT_FALSE(folder.holds(tokens_of(50)));
    EXPECT_TRUE(folder.save(tokens_of(80), state_of(20, 3)));
    EXPECT_EQ(files(), 2U);
}

TEST_F(FolderTest, KeepsItsLimitByDroppingTheLeastRecentlyUsed) {
    const auto age = [&](const Tokens& tokens, int hours) {
        fs::last_write_time(root_ / "sessions" / SessionFolder::file_name(tokens),
                            fs::file_time_type::clock::now() - std::chrono::hours(hours));
    };
    int64_t one = 0;
    {
        SessionFolder folder = open();
        folder.save(tokens_of(40, 1000), state_of(500, 1));
        one = folder.contents().bytes;
        for (const int first : {2000, 3000}) {
            folder.save(tokens_of(40, first), state_of(500, static_cast<uint32_t>(first)));
        }
    }
    SessionFolder folder = open(one * 7 / 2);
    age(tokens_of(40, 1000), 3);
    age(tokens_of(40, 2000), 2);
    age(tokens_of(40, 3000), 1);
    ASSERT_TRUE(folder.load(folder.find(tokens_of(40, 1000), 0)->name)); // the oldest is used now
    EXPECT_TRUE(folder.save(tokens_of(40, 4000), state_of(500, 4)));
    EXPECT_TRUE(folder.holds(tokens_of(40, 1000)));
    EXPECT_FALSE(folder.holds(tokens_of(40, 2000)));
    EXPECT_TRUE(folder.holds(tokens_of(40, 3000)));
    EXPECT_TRUE(folder.holds(tokens_of(40, 4000)));
    EXPECT_EQ(files(), 3U);
    // One that alone is too large displaces nothing for good and is not kept.
    EXPECT_FALSE(folder.save(tokens_of(40, 5000), state_of(5000, 5)));
    EXPECT_FALSE(folder.holds(tokens_of(40, 5000)));
    ASSERT_EQ(notices_.size(), 1U);
    EXPECT_NE(notices_.front().find("does not fit into the limit"), std::string::npos);
    EXPECT_TRUE(folder.holds(tokens_of(40, 4000)));
}

TEST_F(FolderTest, ForeignAndDamagedFilesAreNamedOnce) {
    SessionOrigin other = kOrigin;
    other.kv = "3/3 bits";
    open(1 << 30, other).save(tokens_of(64, 100), state_of(10, 1));
    const fs::path foreign = root_ / "sessions" / SessionFolder::file_name(tokens_of(64, 100));
    const fs::path head = root_ / "sessions" / SessionFolder::file_name(tokens_of(64, 200));
    const fs::path body = root_ / "sessions" / SessionFolder::file_name(tokens_of(64, 300));
    open().save(tokens_of(64, 200), state_of(10, 2));
    open().save(tokens_of(64, 300), state_of(10, 3));
    Bytes bytes = bytes_of(head);
    bytes[60] ^= 1;
    put_bytes(head, bytes);
    bytes = bytes_of(body);
    bytes.back() ^= 1;
    put_bytes(body, bytes);
    put_bytes(root_ / "sessions" / "notes.txt", {1, 2, 3});
    put_bytes(root_ / "sessions" / "0.tqs.abcdef.part", {1, 2, 3});
    fs::create_symlink("/etc/passwd", root_ / "sessions" / "link.tqs");

    notices_.clear();
    SessionFolder folder = open();
    ASSERT_EQ(notices_.size(), 2U);
    std::sort(notices_.begin(), notices_.end());
    const auto named = [&](const fs::path& path, const char* why) {
        return std::count_if(notices_.begin(), notices_.end(), [&](const std::string& line) {
            return line.rfind(path.string() + ": ", 0) == 0 && line.find(why) != std::string::npos;
        });
    };
    EXPECT_EQ(named(foreign, "another cache, 3/3 bits"), 1);
    EXPECT_EQ(named(head, "damaged (checksum)"), 1);
    EXPECT_FALSE(folder.find(tokens_of(64, 100), 0));
    EXPECT_FALSE(folder.find(tokens_of(64, 200), 0));
    // Only its state is damaged: seen when it is loaded.
    const auto found = folder.find(tokens_of(64, 300), 0);
    ASSERT_TRUE(found);
    EXPECT_FALSE(folder.load(found->name));
    EXPECT_EQ(named(body, "damaged (checksum)"), 1);
    EXPECT_FALSE(folder.find(tokens_of(64, 300), 0));
    EXPECT_EQ(notices_.size(), 3U);
    // The prompt was read again and its cache saved again, over the damaged file.
    EXPECT_TRUE(folder.save(tokens_of(64, 300), state_of(10, 3)));
    EXPECT_TRUE(folder.load(found->name));
    EXPECT_TRUE(fs::exists(foreign));
    EXPECT_TRUE(fs::exists(root_ / "sessions" / "notes.txt"));
    EXPECT_FALSE(fs::exists(root_ / "sessions" / "0.tqs.abcdef.part"));
    EXPECT_FALSE(folder.load("../a.tqs"));
}

TEST_F(FolderTest, AFileThatVanishedIsReadAgain) {
    SessionFolder folder = open();
    folder.save(tokens_of(64), state_of(10, 1));
    const auto found = folder.find(tokens_of(64), 0);
    ASSERT_TRUE(found);
    fs::remove(root_ / "sessions" / found->name);
    EXPECT_FALSE(folder.load(found->name));
    EXPECT_FALSE(folder.find(tokens_of(64), 0));
    EXPECT_EQ(notices_.size(), 1U);
}

TEST_F(FolderTest, NamesTellNothing) {
    const std::string name = SessionFolder::file_name(tokens_of(64));
    EXPECT_EQ(name.size(), 32U + 4U);
    EXPECT_EQ(name.find_first_not_of("0123456789abcdef"), 32U);
    EXPECT_NE(name, SessionFolder::file_name(tokens_of(65)));
}

// ---- the engine's store --------------------------------------------------------------------------------------------

TEST_F(FolderTest, TheStoreFindsWhatIsNotWrittenYetAndWhatIs) {
    const Bytes state = state_of(20000, 1); // takes a moment to pack and write
    {
        serve::FolderStore store(root_ / "sessions", kOrigin, 1 << 30, {});
        for (int i = 0; i < 5; ++i) {
            store.save(tokens_of(64, 1000 * i), state);
            const auto loaded = store.load(tokens_of(70, 1000 * i), 0);
            ASSERT_TRUE(loaded) << i;
            EXPECT_EQ(loaded->tokens, tokens_of(64, 1000 * i));
            EXPECT_EQ(loaded->state, state);
        }
        store.flush();
        EXPECT_EQ(store.contents().files, 5);
        EXPECT_FALSE(store.load(tokens_of(64), 64));
        store.save(tokens_of(64, 7000), state); // the destructor writes it
    }
    serve::FolderStore store(root_ / "sessions", kOrigin, 1 << 30, {});
    EXPECT_EQ(store.contents().files, 6);
    ASSERT_TRUE(store.load(tokens_of(64, 7000), 10));
}

TEST_F(FolderTest, TheStoreForgetsWhatCannotBeUsed) {
    const Bytes state = state_of(20000, 1); // takes a moment to pack and write
    serve::FolderStore store(root_ / "sessions", kOrigin, 1 << 30,
                             [this](const std::string& line) { notices_.push_back(line); });
    store.save(tokens_of(64, 1000), state);
    store.save(tokens_of(64, 2000), state);
    store.forget(tokens_of(64, 2000), "refused"); // while it is being written
    store.flush();
    EXPECT_FALSE(store.load(tokens_of(64, 2000), 0));
    EXPECT_TRUE(store.load(tokens_of(64, 1000), 0));
    ASSERT_EQ(notices_.size(), 1U);
    const std::string name = SessionFolder::file_name(tokens_of(64, 2000));
    EXPECT_NE(notices_[0].find(name + ": refused"), std::string::npos) << notices_[0];
    EXPECT_TRUE(fs::exists(root_ / "sessions" / name));
    // Read again and saved again, it is good again.
    const Bytes fresh = state_of(100, 2);
    store.save(tokens_of(64, 2000), fresh);
    store.flush();
    const auto loaded = store.load(tokens_of(64, 2000), 0);
    ASSERT_TRUE(loaded);
    EXPECT_EQ(loaded->state, fresh);
}

TEST_F(FolderTest, TheStoreTakesSeveralThreads) {
    serve::FolderStore store(root_ / "sessions", kOrigin, 1 << 30, {});
    std::vector<std::thread> threads;
    threads.reserve(4);
    for (int t = 0; t < 4; ++t) {
        threads.emplace_back([&store, t] {
            for (int i = 0; i < 10; ++i) {
                const Tokens tokens = tokens_of(40 + i, 10000 * t);
                store.save(tokens, state_of(200, static_cast<uint32_t>(t)));
                if (const auto loaded = store.load(tokens, 0)) {
                    EXPECT_EQ(loaded->tokens.front(), 10000 * t);
                }
            }
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    store.flush();
    EXPECT_EQ(store.contents().files, 4); // each took its beginning's place
}

} // namespace
