#include "llm/session_archive.h"

#include "llm/profile_cache.h"
#include "llm/user_cache.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <system_error>

#include <fcntl.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <sys/stat.h>
#include <unistd.h>
#include <zstd.h>

namespace turboquant::llm {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr char kMagic[] = "TQSESS\r\n"; // a transfer as text would break it
constexpr size_t kMagicBytes = sizeof kMagic - 1;
constexpr uint32_t kVersion = 1;
constexpr size_t kFixedBytes = 56;
constexpr size_t kHashedFixedBytes = 48;
// Codes hardly pack: higher levels take several times as long for a few per cent (docs/serve.md).
constexpr int kLevel = 1;
// What a state may unpack to: rows of zeros pack well, but a file must not make us take any amount of memory.
constexpr uint64_t kMostUnpacking = 256;
constexpr uint64_t kAlwaysUnpacked = 1 << 20;

void put(uint8_t* at, uint64_t value, int bytes) {
    for (int i = 0; i < bytes; ++i) {
        at[i] = static_cast<uint8_t>(value >> (8 * i));
    }
}

uint64_t get(const uint8_t* at, int bytes) {
    uint64_t value = 0;
    for (int i = 0; i < bytes; ++i) {
        value |= static_cast<uint64_t>(at[i]) << (8 * i);
    }
    return value;
}

std::string reason() {
    return std::strerror(errno);
}

class File {
public:
    explicit File(int descriptor) : descriptor_(descriptor) {}
    ~File() { close(); }
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    int get() const { return descriptor_; }
    bool close() {
        const int descriptor = descriptor_;
        descriptor_ = -1;
        return descriptor < 0 || ::close(descriptor) == 0;
    }
    bool write(const void* data, size_t bytes) {
        const auto* at = static_cast<const char*>(data);
        while (bytes > 0) {
            const ssize_t n = ::write(descriptor_, at, bytes);
            if (n < 0 && errno == EINTR) {
                continue;
            }
            if (n <= 0) {
                return false;
            }
            at += n;
            bytes -= static_cast<size_t>(n);
        }
        return true;
    }
    // False at the file's end too; errno is then 0.
    bool read(uint64_t offset, void* data, size_t bytes) {
        auto* at = static_cast<char*>(data);
        while (bytes > 0) {
            const ssize_t n = ::pread(descriptor_, at, bytes, static_cast<off_t>(offset));
            if (n < 0 && errno == EINTR) {
                continue;
            }
            if (n <= 0) {
                errno = n == 0 ? 0 : errno;
                return false;
            }
            at += n;
            offset += static_cast<uint64_t>(n);
            bytes -= static_cast<size_t>(n);
        }
        return true;
    }

private:
    int descriptor_;
};

Error unreadable(const fs::path& path) {
    return Error(fmt::format("{}: cannot be read: {}; check its path and permissions", path.string(), reason()));
}

DamagedSession damaged(const fs::path& path, const std::string& what) {
    return DamagedSession(fmt::format("{}: {}", path.string(), what));
}

// Opens for reading; bytes: its length. A device or a pipe is no session, and could block for ever.
int open_file(const fs::path& path, uint64_t& bytes) {
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat info = {};
    if (descriptor < 0 || ::fstat(descriptor, &info) != 0) {
        const Error error = unreadable(path);
        if (descriptor >= 0) {
            ::close(descriptor);
        }
        throw error;
    }
    if (!S_ISREG(info.st_mode)) {
        ::close(descriptor);
        throw damaged(path, "not a file that tq saved a conversation to");
    }
    bytes = static_cast<uint64_t>(info.st_size);
    return descriptor;
}

void read_part(File& file, const fs::path& path, uint64_t offset, void* data, size_t bytes) {
    if (!file.read(offset, data, bytes)) {
        if (errno != 0) {
            throw unreadable(path);
        }
        throw damaged(path, "cut short");
    }
}

std::vector<uint8_t> pack(const std::vector<uint8_t>& state) {
    std::vector<uint8_t> packed;
    if (state.empty()) {
        return packed;
    }
    packed.resize(ZSTD_compressBound(state.size()));
    const size_t bytes = ZSTD_compress(packed.data(), packed.size(), state.data(), state.size(), kLevel);
    if (ZSTD_isError(bytes) != 0) {
        throw Error(fmt::format("the cache's state cannot be packed: {}; free some memory", ZSTD_getErrorName(bytes)));
    }
    packed.resize(bytes);
    return packed;
}

// Makes a new name last a power cut; where a file system cannot, the file itself is safe all the same.
void sync_folder(const fs::path& path) {
    const fs::path folder = path.has_parent_path() ? path.parent_path() : fs::path(".");
    const File file(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (file.get() >= 0) {
        ::fsync(file.get());
    }
}

} // namespace

std::string SessionOrigin::obstacle(const SessionOrigin& saved) const {
    if (saved.model != model) {
        return "it was saved with another model";
    }
    if (saved.kv != kv) {
        return "it was saved with another cache, " + saved.kv;
    }
    if (saved.host != host) {
        return "it was saved by another version of libllama, " + saved.host;
    }
    return {};
}

SessionOrigin session_origin(const Model& model, const KvChoice& kv) {
    SessionOrigin origin;
    origin.model = fmt::format("{}, {}", model.identity(), model_fingerprint(model.path()));
    origin.kv = kv.describe();
    if (kv.turboquant()) {
        // By what is stored, not by the name that was given for it.
        origin.kv = fmt::format("{} bits, window {}, sinks {}", kv.bits(), kv.window, kv.sinks);
        for (const auto& [layer, bits] : kv.layer_bits) {
            origin.kv += fmt::format(" {}:{}/{}", layer, bits.key, bits.value);
        }
        if (kv.emulate_q4_0) {
            origin.kv += " q4_0-emulated";
        }
    }
    origin.host = fmt::format("{}, state {}", llama_version(), LLAMA_STATE_SEQ_VERSION);
    return origin;
}

uint64_t write_session(const fs::path& path, const SessionOrigin& origin, const std::string& note,
                       const std::vector<Token>& tokens, const std::vector<uint8_t>& state) {
    static_assert(sizeof(Token) == 4);
    const std::string head =
        json{{"model", origin.model}, {"kv", origin.kv}, {"host", origin.host}, {"note", note}}.dump();
    std::vector<uint8_t> token_bytes(tokens.size() * sizeof(Token));
    for (size_t i = 0; i < tokens.size(); ++i) {
        put(token_bytes.data() + 4 * i, static_cast<uint32_t>(tokens[i]), 4);
    }
    const std::vector<uint8_t> packed = pack(state);
    uint8_t fixed[kFixedBytes] = {};
    std::memcpy(fixed, kMagic, kMagicBytes);
    put(fixed + 8, kVersion, 4);
    put(fixed + 12, head.size(), 4);
    put(fixed + 16, tokens.size(), 8);
    put(fixed + 24, state.size(), 8);
    put(fixed + 32, packed.size(), 8);
    put(fixed + 40, hash_bytes(packed.data(), packed.size()), 8);
    uint64_t hash = hash_bytes(fixed, kHashedFixedBytes);
    hash = hash_bytes(head.data(), head.size(), hash);
    put(fixed + kHashedFixedBytes, hash_bytes(token_bytes.data(), token_bytes.size(), hash), 8);

    std::string part = path.string() + ".XXXXXX.part";
    File file(::mkostemps(part.data(), 5, O_CLOEXEC)); // 0600
    const auto fail = [&] {
        const std::string why = reason();
        if (file.get() >= 0) {
            ::unlink(part.c_str());
        }
        throw Error(
            fmt::format("{}: cannot be written: {}; choose another place or free some room", path.string(), why));
    };
    if (file.get() < 0) {
        fail();
    }
    if (!file.write(fixed, sizeof fixed) || !file.write(head.data(), head.size()) ||
        !file.write(token_bytes.data(), token_bytes.size()) || !file.write(packed.data(), packed.size()) ||
        ::fsync(file.get()) != 0 || ::rename(part.c_str(), path.c_str()) != 0) {
        fail();
    }
    file.close();
    sync_folder(path);
    return kFixedBytes + head.size() + token_bytes.size() + packed.size();
}

SessionHead read_session_head(const fs::path& path) {
    uint64_t file_bytes = 0;
    File file(open_file(path, file_bytes));
    uint8_t fixed[kFixedBytes] = {};
    read_part(file, path, 0, fixed, std::min<size_t>(file_bytes, sizeof fixed));
    if (file_bytes < kMagicBytes || std::memcmp(fixed, kMagic, kMagicBytes) != 0) {
        throw damaged(path, "not a file that tq saved a conversation to");
    }
    if (file_bytes < kFixedBytes) {
        throw damaged(path, "cut short");
    }
    if (get(fixed + 8, 4) != kVersion) {
        throw damaged(path, fmt::format("format version {}, this tq reads {}", get(fixed + 8, 4), kVersion));
    }
    SessionHead head;
    const uint64_t head_bytes = get(fixed + 12, 4);
    const uint64_t n_tokens = get(fixed + 16, 8);
    head.state_bytes = get(fixed + 24, 8);
    head.packed_bytes = get(fixed + 32, 8);
    head.packed_hash = get(fixed + 40, 8);
    // Each first against the file's length, so that the sum cannot wrap.
    const bool plausible = head_bytes <= file_bytes && n_tokens <= file_bytes / 4 && head.packed_bytes <= file_bytes;
    const uint64_t expected = kFixedBytes + head_bytes + 4 * n_tokens + head.packed_bytes;
    if (!plausible || expected > file_bytes) {
        throw damaged(path, "cut short or damaged: its parts are longer than the file");
    }
    std::string text(head_bytes, '\0');
    std::vector<uint8_t> token_bytes(4 * n_tokens);
    read_part(file, path, kFixedBytes, text.data(), text.size());
    read_part(file, path, kFixedBytes + head_bytes, token_bytes.data(), token_bytes.size());
    uint64_t hash = hash_bytes(fixed, kHashedFixedBytes);
    hash = hash_bytes(text.data(), text.size(), hash);
    hash = hash_bytes(token_bytes.data(), token_bytes.size(), hash);
    if (hash != get(fixed + kHashedFixedBytes, 8) || expected != file_bytes) {
        throw damaged(path, "damaged (checksum)");
    }
    if (head.state_bytes / kMostUnpacking > head.packed_bytes + kAlwaysUnpacked) {
        throw damaged(path, "damaged: its state would unpack to more than it can hold");
    }
    try {
        const json root = json::parse(text);
        root.at("model").get_to(head.origin.model);
        root.at("kv").get_to(head.origin.kv);
        root.at("host").get_to(head.origin.host);
        root.at("note").get_to(head.note);
    } catch (const json::exception&) {
        throw damaged(path, "damaged: its head is not what tq writes");
    }
    head.tokens.resize(n_tokens);
    for (size_t i = 0; i < n_tokens; ++i) {
        head.tokens[i] = static_cast<Token>(get(token_bytes.data() + 4 * i, 4));
    }
    head.packed_at = expected - head.packed_bytes;
    return head;
}

std::vector<uint8_t> read_session_state(const fs::path& path, const SessionHead& head) {
    uint64_t file_bytes = 0;
    File file(open_file(path, file_bytes));
    std::vector<uint8_t> state;
    if (file_bytes != head.packed_at + head.packed_bytes) {
        throw damaged(path, "cut short or changed since it was opened");
    }
    std::vector<uint8_t> packed(head.packed_bytes);
    read_part(file, path, head.packed_at, packed.data(), packed.size());
    if (hash_bytes(packed.data(), packed.size()) != head.packed_hash) {
        throw damaged(path, "damaged (checksum)");
    }
    if (head.state_bytes == 0 && packed.empty()) {
        return state;
    }
    if (ZSTD_getFrameContentSize(packed.data(), packed.size()) != head.state_bytes) {
        throw damaged(path, "damaged: its state is not as long as it says");
    }
    state.resize(head.state_bytes);
    if (ZSTD_decompress(state.data(), state.size(), packed.data(), packed.size()) != state.size()) {
        throw damaged(path, "damaged: its state cannot be unpacked");
    }
    return state;
}

} // namespace turboquant::llm
