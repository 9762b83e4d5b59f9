// The profile file. docs/format.md, "Profile file", has the bytes.
#include "turboquant/profile.h"

#include "conditioning/bytes.h"
#include "turboquant/layout.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <initializer_list>
#include <memory>
#include <random>
#include <system_error>
#include <utility>

namespace turboquant {

namespace {

constexpr uint32_t kMagic = 0x46505154; // "TQPF"
constexpr uint32_t kVersion = 1;
constexpr size_t kChecksumAt = 12; // over all other bytes
constexpr size_t kHeaderBytes = 16;
constexpr size_t kLargestFile = size_t{1} << 28;
constexpr const char* kRemedy = "; make it anew with `tq tune`";

struct CloseFile {
    void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, CloseFile>;

std::string reason(int error) {
    return std::generic_category().message(error);
}

uint32_t file_checksum(const std::vector<uint8_t>& bytes) {
    return crc32(crc32(0, bytes.data(), kChecksumAt), bytes.data() + kHeaderBytes, bytes.size() - kHeaderBytes);
}

void append_text(std::vector<uint8_t>& out, const std::string& text) {
    append(out, text.size(), 4);
    out.insert(out.end(), text.begin(), text.end());
}

// Reads front to back and remembers whether it ever ran past the end.
class Reader {
public:
    explicit Reader(const std::vector<uint8_t>& bytes, size_t at) : bytes_(bytes), at_(at) {}
    bool ok() const { return ok_; }
    bool at_end() const { return at_ == bytes_.size(); }
    const uint8_t* take(size_t n) {
        if (!ok_ || n > bytes_.size() - at_) {
            ok_ = false;
            return nullptr;
        }
        const uint8_t* const p = bytes_.data() + at_;
        at_ += n;
        return p;
    }
    uint64_t number(int n) {
        const uint8_t* const p = take(static_cast<size_t>(n));
        return p != nullptr ? get_at(p, n) : 0;
    }
    std::string text() {
        const auto n = static_cast<size_t>(number(4));
        const uint8_t* const p = take(n);
        return p != nullptr ? std::string(p, p + n) : std::string();
    }

private:
    const std::vector<uint8_t>& bytes_;
    size_t at_;
    bool ok_ = true;
};

bool is_width(int bits) {
    const std::initializer_list<int> widths = {0, 2, 3, 4, 5, 6, 8, 16};
    return std::find(widths.begin(), widths.end(), bits) != widths.end();
}

Status damaged(const std::string& what) {
    return invalid("damaged (" + what + ")");
}

Status parse_layer(Reader& in, LayerProfile& out) {
    out.layer = static_cast<int>(in.number(4));
    out.head_size = static_cast<int>(in.number(2));
    out.kv_heads = static_cast<int>(in.number(2));
    out.key_bits = static_cast<int>(in.number(1));
    out.value_bits = static_cast<int>(in.number(1));
    in.number(2);
    const auto size = static_cast<size_t>(in.number(4));
    const uint8_t* const record = in.take(size);
    if (record == nullptr) {
        return damaged("it ends within a layer");
    }
    if (!is_width(out.key_bits) || !is_width(out.value_bits)) {
        return damaged("a layer of " + std::to_string(out.key_bits) + "/" + std::to_string(out.value_bits) + " bits");
    }
    return read_conditioning(record, size, out.head_size, out.kv_heads, out.keys);
}

} // namespace

const LayerProfile* Profile::find(int layer) const {
    const auto found = std::lower_bound(layers.begin(), layers.end(), layer,
                                        [](const LayerProfile& l, int wanted) { return l.layer < wanted; });
    return found != layers.end() && found->layer == layer ? &*found : nullptr;
}

std::vector<uint8_t> serialise_profile(const Profile& profile) {
    std::vector<uint8_t> out;
    append(out, kMagic, 4);
    append(out, kVersion, 4);
    append(out, profile.layers.size(), 4);
    append(out, 0, 4);
    append(out, std::bit_cast<uint64_t>(profile.bits), 8);
    append_text(out, profile.model);
    append_text(out, profile.text);
    for (const LayerProfile& l : profile.layers) {
        const std::vector<uint8_t> record = write_conditioning(l.keys, l.head_size, l.kv_heads);
        append(out, static_cast<uint64_t>(l.layer), 4);
        append(out, static_cast<uint64_t>(l.head_size), 2);
        append(out, static_cast<uint64_t>(l.kv_heads), 2);
        append(out, static_cast<uint64_t>(l.key_bits), 1);
        append(out, static_cast<uint64_t>(l.value_bits), 1);
        append(out, 0, 2);
        append(out, record.size(), 4);
        out.insert(out.end(), record.begin(), record.end());
    }
    put_at(out.data() + kChecksumAt, file_checksum(out), 4);
    return out;
}

Status parse_profile(const std::vector<uint8_t>& bytes, Profile& out) {
    if (bytes.size() < kHeaderBytes || get_at(bytes.data(), 4) != kMagic) {
        return invalid("not a TurboQuant profile");
    }
    Reader in(bytes, 4);
    const auto version = in.number(4);
    if (version != kVersion) {
        return invalid("a profile of version " + std::to_string(version) + "; this library reads version " +
                       std::to_string(kVersion));
    }
    const auto n_layers = in.number(4);
    if (in.number(4) != file_checksum(bytes)) {
        return damaged("wrong checksum");
    }
    Profile read;
    read.bits = std::bit_cast<double>(in.number(8));
    read.model = in.text();
    read.text = in.text();
    if (!in.ok() || !std::isfinite(read.bits) || read.bits < 0) {
        return damaged("its head makes no sense");
    }
    for (uint64_t i = 0; i < n_layers; ++i) {
        LayerProfile layer;
        if (Status status = parse_layer(in, layer); !status.ok()) {
            return status;
        }
        if (layer.layer < 0 || (!read.layers.empty() && layer.layer <= read.layers.back().layer)) {
            return damaged("layers out of order");
        }
        read.layers.push_back(std::move(layer));
    }
    if (!in.at_end()) {
        return damaged("bytes after its last layer");
    }
    out = std::move(read);
    return {};
}

Status read_profile(const std::string& path, Profile& out) {
    const std::string what = "profile '" + path + "': ";
    // A folder opens like a file on Linux and only reading it fails.
    const File file(std::fopen(path.c_str(), "rb"));
    if (file == nullptr) {
        return invalid(what + reason(errno) + kRemedy);
    }
    std::vector<uint8_t> bytes;
    size_t n = 0;
    do {
        const size_t old = bytes.size();
        bytes.resize(old + (size_t{1} << 16));
        n = std::fread(bytes.data() + old, 1, bytes.size() - old, file.get());
        bytes.resize(old + n);
    } while (n > 0 && bytes.size() <= kLargestFile);
    if (std::ferror(file.get()) != 0) {
        return invalid(what + reason(errno) + kRemedy);
    }
    if (bytes.size() > kLargestFile) {
        return invalid(what + "not a TurboQuant profile (larger than 256 MiB)" + kRemedy);
    }
    if (const Status status = parse_profile(bytes, out); !status.ok()) {
        return {status.code(), what + status.message() + kRemedy};
    }
    return {};
}

Status write_profile(const std::string& path, const Profile& profile) {
    const std::string what = "profile '" + path + "': ";
    const std::vector<uint8_t> bytes = serialise_profile(profile);
    Profile back;
    if (const Status status = parse_profile(bytes, back); !status.ok()) { // never leave what nobody can read
        return {status.code(), what + "not written: " + status.message()};
    }
    // Beside the target, so that the rename stays within one file system.
    const std::string temporary = path + "." + std::to_string(std::random_device{}()) + ".tmp";
    std::error_code error;
    File file(std::fopen(temporary.c_str(), "wbx"));
    if (file == nullptr) {
        return invalid(what + "cannot be written: " + reason(errno) + "; name another place");
    }
    const bool written = std::fwrite(bytes.data(), 1, bytes.size(), file.get()) == bytes.size();
    if (!written || std::fclose(file.release()) != 0) {
        const int cause = errno;
        std::filesystem::remove(temporary, error);
        return invalid(what + "cannot be written: " + reason(cause) + "; name another place");
    }
    std::filesystem::rename(temporary, path, error);
    if (error) {
        std::error_code ignored;
        std::filesystem::remove(temporary, ignored);
        return invalid(what + "cannot be replaced: " + error.message() + "; name another place");
    }
    return {};
}

} // namespace turboquant
