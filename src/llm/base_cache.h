// What the base (the host's f16 cache) says at every scored position, kept on disk: fp16 log-probabilities over the whole
// vocabulary. One file per model, text and placement of chunks, told apart by a key.
#pragma once

#include "llm/evaluation.h"

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>

namespace turboquant::llm {

// Says which model, tokens and positions a base belongs to. Error when the model's file cannot be read.
std::string base_key(const Model& model, const Chunks& chunks);
// The file of a key, in the user's cache folder.
std::filesystem::path base_path(const std::string& key);

class BaseFile {
public:
    // Maps the file and checks all of it. Null when there is none; also when it is damaged or of another key (damaged is
    // then true): it has to be made again.
    static std::unique_ptr<BaseFile> open(const std::filesystem::path& path, const std::string& key, int64_t vocabulary,
                                          int64_t rows, bool& damaged);
    ~BaseFile();
    BaseFile(const BaseFile&) = delete;
    BaseFile& operator=(const BaseFile&) = delete;

    // 0 <= index < rows; valid as long as this object. Thread-safe.
    BaseRow row(int64_t index) const;

private:
    BaseFile() = default;
    const unsigned char* data_ = nullptr;
    size_t bytes_ = 0;
    size_t first_row_ = 0;
    size_t row_bytes_ = 0;
    size_t rows_ = 0;
};

// Writes such a file beside its final place and moves it there at the end; without finish() nothing stays.
class BaseWriter {
public:
    // Error when the file cannot be made.
    BaseWriter(std::filesystem::path path, const std::string& key, int64_t vocabulary, int64_t rows);
    ~BaseWriter();
    BaseWriter(const BaseWriter&) = delete;
    BaseWriter& operator=(const BaseWriter&) = delete;

    void add(const BaseRow& row); // rows in order. Error: the disk is full, for example
    void finish();                // all rows must have been added

private:
    void write(const void* data, size_t bytes);

    std::filesystem::path path_;
    std::filesystem::path temporary_;
    std::FILE* file_ = nullptr;
    int64_t vocabulary_ = 0;
};

} // namespace turboquant::llm
