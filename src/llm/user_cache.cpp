#include "llm/user_cache.h"

#include "llm/error.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <system_error>
#include <vector>

#include <fmt/format.h>

namespace turboquant::llm {

namespace fs = std::filesystem;

fs::path user_cache_folder(const std::string& part) {
    fs::path folder;
    if (const char* given = std::getenv("XDG_CACHE_HOME"); given != nullptr && *given == '/') {
        folder = given;
    } else if (const char* home = std::getenv("HOME"); home != nullptr && *home != '\0') {
        folder = fs::path(home) / ".cache";
    } else {
        throw Error("no cache folder: neither XDG_CACHE_HOME nor HOME is set; set one of them");
    }
    folder = folder / "turboquant" / part;
    std::error_code failed;
    fs::create_directories(folder, failed);
    if (failed) {
        throw Error(fmt::format("{}: cannot be made: {}; set XDG_CACHE_HOME to a folder that can be written",
                                folder.string(), failed.message()));
    }
    return folder;
}

// Words of 8 bytes through multiply and xor-shift (the finaliser of MurmurHash3, public domain, on each).
uint64_t hash_bytes(const void* data, size_t bytes, uint64_t seed) {
    const auto* at = static_cast<const unsigned char*>(data);
    uint64_t hash = seed ^ (0x9e3779b97f4a7c15ULL * (bytes + 1));
    while (bytes > 0) {
        uint64_t word = 0;
        const size_t n = std::min<size_t>(bytes, sizeof word);
        std::memcpy(&word, at, n);
        at += n;
        bytes -= n;
        hash ^= word;
        hash ^= hash >> 33;
        hash *= 0xff51afd7ed558ccdULL;
        hash ^= hash >> 33;
        hash *= 0xc4ceb9fe1a85ec53ULL;
        hash ^= hash >> 33;
    }
    return hash;
}

std::string sample_identity(const std::string& path, int samples, uint64_t seed) {
    constexpr uint64_t kSampleBytes = 65536;
    std::ifstream file(path, std::ios::binary);
    std::error_code failed;
    const uint64_t size = fs::file_size(path, failed);
    if (failed || !file) {
        throw Error(fmt::format("{}: cannot be read: {}; check its path and permissions", path,
                                failed ? failed.message() : std::strerror(errno)));
    }
    const uint64_t last = size > kSampleBytes ? size - kSampleBytes : 0;
    const uint64_t step = last / (static_cast<uint64_t>(samples) - 1);
    uint64_t hash = seed;
    std::vector<char> block(kSampleBytes);
    for (int i = 0; i < samples; ++i) {
        file.clear();
        file.seekg(static_cast<std::streamoff>(step * static_cast<uint64_t>(i)));
        file.read(block.data(), static_cast<std::streamsize>(block.size()));
        hash = hash_bytes(block.data(), static_cast<size_t>(file.gcount()), hash);
    }
    return fmt::format("{}-{:016x}", size, hash);
}

std::string file_identity(const std::string& path) {
    std::error_code ignored; // sample_identity says why a file cannot be read
    const auto ticks = static_cast<uint64_t>(fs::last_write_time(path, ignored).time_since_epoch().count());
    return sample_identity(path, 64, hash_bytes(&ticks, sizeof ticks));
}

} // namespace turboquant::llm
