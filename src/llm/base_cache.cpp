#include "llm/base_cache.h"

#include "llm/error.h"
#include "llm/user_cache.h"

#include <cerrno>
#include <cstring>
#include <vector>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fmt/format.h>

namespace turboquant::llm {
namespace {

// File: kMagic, uint64 length of the key, the key padded to 8 bytes, rows. Row: RowHead, fp16[vocabulary] padded to 8.
// In the machine's own byte order; a file of another one fails the magic's number.
constexpr uint64_t kMagic = 0x3153414251540a01ULL; // "\x01\nTQBAS1"

struct RowHead {
    uint64_t checksum = 0; // of all that follows in the row
    double nll = 0;
    int64_t top = 0;
};

size_t padded(size_t bytes) {
    return (bytes + 7) / 8 * 8;
}

size_t row_size(int64_t vocabulary) {
    return sizeof(RowHead) + padded(static_cast<size_t>(vocabulary) * sizeof(uint16_t));
}

} // namespace

std::string base_key(const Model& model, const Chunks& chunks) {
    uint64_t tokens = 0;
    for (const std::vector<Token>& chunk : chunks.tokens) {
        tokens = hash_bytes(chunk.data(), chunk.size() * sizeof(Token), tokens);
    }
    // libllama's version and the processor's features: another build's base differs in its last bits.
    return fmt::format("model {}; llama.cpp {}, {}; ctx {}; chunks {}; stride {}; tokens {:016x}",
                       file_identity(model.path()), llama_version(), llama_print_system_info(), chunks.context,
                       chunks.tokens.size(), chunks.stride, tokens);
}

std::filesystem::path base_path(const std::string& key) {
    return user_cache_folder("eval") / fmt::format("base-{:016x}.bin", hash_bytes(key.data(), key.size()));
}

std::unique_ptr<BaseFile> BaseFile::open(const std::filesystem::path& path, const std::string& key, int64_t vocabulary,
                                         int64_t rows, bool& damaged) {
    damaged = false;
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return nullptr;
    }
    struct stat status = {};
    void* data = MAP_FAILED;
    if (fstat(fd, &status) == 0 && status.st_size > 0) {
        data = mmap(nullptr, static_cast<size_t>(status.st_size), PROT_READ, MAP_PRIVATE, fd, 0);
    }
    ::close(fd);
    damaged = true;
    if (data == MAP_FAILED) {
        return nullptr;
    }
    std::unique_ptr<BaseFile> file(new BaseFile);
    file->data_ = static_cast<const unsigned char*>(data);
    file->bytes_ = static_cast<size_t>(status.st_size);
    file->first_row_ = 2 * sizeof(uint64_t) + padded(key.size());
    file->row_bytes_ = row_size(vocabulary);
    file->rows_ = static_cast<size_t>(rows);
    if (file->bytes_ != file->first_row_ + file->rows_ * file->row_bytes_) {
        return nullptr;
    }
    uint64_t head[2] = {};
    std::memcpy(head, file->data_, sizeof head);
    if (head[0] != kMagic || head[1] != key.size() ||
        std::memcmp(file->data_ + sizeof head, key.data(), key.size()) != 0) {
        return nullptr;
    }
    for (size_t i = 0; i < file->rows_; ++i) {
        const unsigned char* row = file->data_ + file->first_row_ + i * file->row_bytes_;
        RowHead row_head;
        std::memcpy(&row_head, row, sizeof row_head);
        if (row_head.checksum !=
            hash_bytes(row + sizeof row_head.checksum, file->row_bytes_ - sizeof row_head.checksum)) {
            return nullptr;
        }
    }
    damaged = false;
    return file;
}

BaseFile::~BaseFile() {
    munmap(const_cast<unsigned char*>(data_), bytes_);
}

BaseRow BaseFile::row(int64_t index) const {
    const unsigned char* row = data_ + first_row_ + static_cast<size_t>(index) * row_bytes_;
    RowHead head;
    std::memcpy(&head, row, sizeof head);
    return {reinterpret_cast<const uint16_t*>(row + sizeof head), static_cast<Token>(head.top), head.nll};
}

BaseWriter::BaseWriter(std::filesystem::path path, const std::string& key, int64_t vocabulary, int64_t rows)
    : path_(std::move(path)), temporary_(path_.string() + fmt::format(".{}.tmp", getpid())), vocabulary_(vocabulary) {
    std::error_code failed;
    const auto space = std::filesystem::space(path_.parent_path(), failed);
    const size_t needed = row_size(vocabulary) * static_cast<size_t>(rows);
    if (!failed && space.available < needed) {
        throw Error(fmt::format("{}: the base needs {} there and {} are free; make room, set XDG_CACHE_HOME to another "
                                "disk, or use a larger --stride",
                                path_.parent_path().string(), format_bytes(static_cast<int64_t>(needed)),
                                format_bytes(static_cast<int64_t>(space.available))));
    }
    file_ = std::fopen(temporary_.c_str(), "wb");
    if (file_ == nullptr) {
        throw Error(fmt::format("{}: cannot be written: {}; set XDG_CACHE_HOME to a folder that can",
                                temporary_.string(), std::strerror(errno)));
    }
    const uint64_t head[2] = {kMagic, key.size()};
    std::string padded_key = key;
    padded_key.resize(padded(key.size()), '\0');
    write(head, sizeof head);
    write(padded_key.data(), padded_key.size());
}

BaseWriter::~BaseWriter() {
    if (file_ != nullptr) {
        std::fclose(file_);
        std::error_code ignored;
        std::filesystem::remove(temporary_, ignored);
    }
}

void BaseWriter::write(const void* data, size_t bytes) {
    if (std::fwrite(data, 1, bytes, file_) != bytes) {
        throw Error(fmt::format("{}: cannot be written: {}; make room there or set XDG_CACHE_HOME", temporary_.string(),
                                std::strerror(errno)));
    }
}

void BaseWriter::add(const BaseRow& row) {
    std::vector<unsigned char> bytes(row_size(vocabulary_));
    RowHead head;
    head.nll = row.nll;
    head.top = row.top;
    std::memcpy(bytes.data() + sizeof head, row.log_probs, static_cast<size_t>(vocabulary_) * sizeof(uint16_t));
    std::memcpy(bytes.data(), &head, sizeof head);
    head.checksum = hash_bytes(bytes.data() + sizeof head.checksum, bytes.size() - sizeof head.checksum);
    std::memcpy(bytes.data(), &head, sizeof head);
    write(bytes.data(), bytes.size());
}

void BaseWriter::finish() {
    const int closed = std::fclose(file_);
    file_ = nullptr;
    std::error_code failed;
    if (closed == 0) {
        std::filesystem::rename(temporary_, path_, failed);
    }
    if (closed != 0 || failed) {
        std::error_code ignored;
        std::filesystem::remove(temporary_, ignored);
        throw Error(fmt::format("{}: cannot be written: {}; make room there or set XDG_CACHE_HOME", path_.string(),
                                failed ? failed.message() : std::strerror(errno)));
    }
}

} // namespace turboquant::llm
