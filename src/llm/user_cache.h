// Files that can be made again, in the user's cache folder.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>

namespace turboquant::llm {

// $XDG_CACHE_HOME/turboquant, else ~/.cache/turboquant, with `part` below it; made if it is not there. Error when it
// cannot be made.
std::filesystem::path user_cache_folder(const std::string& part);

// 64 bits of `bytes` bytes; not cryptographic. Goes on from `seed`.
uint64_t hash_bytes(const void* data, size_t bytes, uint64_t seed = 0);

// Tells files apart by length and `samples` (at least 2) even samples of their contents; goes on from `seed`. Fast for any
// size. Error when it cannot be read.
std::string sample_identity(const std::string& path, int samples, uint64_t seed);

// Tells files apart by length, time of change and samples of their contents: "98336768-1a2b...". Fast for any size.
// Error when it cannot be read.
std::string file_identity(const std::string& path);

} // namespace turboquant::llm
