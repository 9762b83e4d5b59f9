#include "llm/session_folder.h"

#include "llm/user_cache.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <system_error>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>

namespace turboquant::llm {
namespace {

namespace fs = std::filesystem;
constexpr const char* kExtension = ".tqs";
constexpr const char* kPart = ".part";
// Loading a token costs less than this part of reading it (docs/serve.md: about a twentieth).
constexpr int64_t kLoadingCost = 10;

} // namespace

std::string SessionFolder::file_name(const std::vector<Token>& tokens) {
    const size_t bytes = tokens.size() * sizeof(Token);
    return fmt::format("{:016x}{:016x}{}", hash_bytes(tokens.data(), bytes, 1), hash_bytes(tokens.data(), bytes, 2),
                       kExtension);
}

SessionFolder::SessionFolder(fs::path folder, SessionOrigin origin, int64_t limit_bytes, Notice notice)
    : folder_(std::move(folder)), origin_(std::move(origin)), limit_bytes_(limit_bytes), notice_(std::move(notice)) {
    std::error_code failed;
    if (folder_.has_parent_path()) {
        fs::create_directories(folder_.parent_path(), failed);
    }
    if (!failed && ::mkdir(folder_.c_str(), S_IRWXU) != 0 && errno != EEXIST) {
        failed = std::error_code(errno, std::generic_category());
    }
    if (failed) {
        throw Error(fmt::format("{}: the folder for sessions cannot be made: {}; choose another place",
                                folder_.string(), failed.message()));
    }
    struct stat info = {};
    if (::stat(folder_.c_str(), &info) != 0 || !S_ISDIR(info.st_mode)) {
        throw Error(fmt::format("{}: the folder for sessions is not a folder; choose another place", folder_.string()));
    }
    if ((info.st_mode & (S_IRWXG | S_IRWXO)) != 0) {
        throw Error(fmt::format(
            "{}: others may look into this folder, and sessions are private: chmod 700 it, or choose another "
            "place",
            folder_.string()));
    }
    scan();
}

void SessionFolder::notice(const std::string& line) const {
    if (notice_) {
        notice_(line);
    }
}

// Reads the head of every session; removes what a lost process left half written.
void SessionFolder::scan() {
    std::error_code failed;
    fs::directory_iterator files(folder_, failed);
    if (failed) {
        throw Error(fmt::format("{}: the folder for sessions cannot be read: {}; check its permissions",
                                folder_.string(), failed.message()));
    }
    for (; !failed && files != fs::directory_iterator(); files.increment(failed)) {
        const fs::path& path = files->path();
        std::error_code ignored;
        if (path.extension() == kPart && path.stem().stem().extension() == kExtension) {
            fs::remove(path, ignored);
            continue;
        }
        if (path.extension() != kExtension || !fs::is_regular_file(files->symlink_status(ignored))) {
            continue;
        }
        try {
            SessionHead head = read_session_head(path);
            if (const std::string obstacle = origin_.obstacle(head.origin); !obstacle.empty()) {
                notice(fmt::format("{}: not used: {}", path.string(), obstacle));
                continue;
            }
            Entry entry;
            entry.bytes = static_cast<int64_t>(head.packed_at + head.packed_bytes);
            entry.tokens = std::move(head.tokens);
            entries_[path.filename().string()] = std::move(entry);
        } catch (const Error& error) {
            notice(fmt::format("{}; not used, its prompt will be read again", error.what()));
        }
    }
}

std::optional<SavedPrefix> SessionFolder::find(const std::vector<Token>& prompt, int64_t held) const {
    const std::lock_guard lock(mutex_);
    std::optional<SavedPrefix> best;
    int64_t most = 0;
    for (const auto& [name, entry] : entries_) {
        const auto tokens = static_cast<int64_t>(entry.tokens.size());
        const int64_t common = common_prefix(entry.tokens, prompt);
        const int64_t gain =
            (common - held) * kLoadingCost - tokens; // tokens' worth of reading that are spared, times ten
        if (gain > most) {
            most = gain;
            best = SavedPrefix{name, common, tokens};
        }
    }
    return best;
}

bool SessionFolder::holds(const std::vector<Token>& tokens) const {
    const std::lock_guard lock(mutex_);
    const auto found = entries_.find(file_name(tokens));
    return found != entries_.end() && found->second.tokens == tokens;
}

std::optional<SessionFolder::Loaded> SessionFolder::load(const std::string& name) {
    const fs::path path = folder_ / name;
    try {
        {
            const std::lock_guard lock(mutex_);
            if (!entries_.contains(name)) {
                return {}; // find() gives names that are there; anything else never reaches the file system
            }
        }
        SessionHead head = read_session_head(path);
        if (const std::string obstacle = origin_.obstacle(head.origin); !obstacle.empty()) {
            throw Error(fmt::format("{}: {}", path.string(), obstacle)); // another server's, under the same name
        }
        Loaded loaded;
        loaded.state = read_session_state(path, head);
        loaded.tokens = std::move(head.tokens);
        ::utimensat(AT_FDCWD, path.c_str(), nullptr, 0);
        return loaded;
    } catch (const Error& error) {
        notice(fmt::format("{}; not used, its prompt is read again", error.what()));
    } catch (const std::bad_alloc&) {
        notice(fmt::format("{}: too little memory to load it; its prompt is read again", path.string()));
    }
    forget(name);
    return {};
}

void SessionFolder::refuse(const std::vector<Token>& tokens, std::string_view reason) {
    const std::string name = file_name(tokens);
    notice(fmt::format("{}: {}; not used, its prompt is read again", (folder_ / name).string(), reason));
    forget(name);
}

void SessionFolder::forget(const std::string& name) {
    const std::lock_guard lock(mutex_);
    entries_.erase(name);
}

bool SessionFolder::save(const std::vector<Token>& tokens, const std::vector<uint8_t>& state) {
    const std::lock_guard writing(writing_);
    const std::string name = file_name(tokens);
    const fs::path path = folder_ / name;
    if (holds(tokens) && ::utimensat(AT_FDCWD, path.c_str(), nullptr, 0) == 0) {
        return true;
    }
    int64_t bytes = 0;
    try {
        bytes = static_cast<int64_t>(write_session(path, origin_, {}, tokens, state));
    } catch (const Error& error) {
        notice(error.what());
        return false;
    } catch (const std::bad_alloc&) {
        notice(fmt::format("{}: too little memory to save it", path.string()));
        return false;
    }
    std::error_code ignored;
    if (bytes > limit_bytes_) {
        notice(fmt::format("{}: a session of {} bytes does not fit into the limit of {}; raise it", path.string(),
                           bytes, limit_bytes_));
        forget(name);
        fs::remove(path, ignored);
        return false;
    }
    std::vector<std::string> continued;
    {
        const std::lock_guard lock(mutex_);
        for (const auto& [other, entry] : entries_) {
            if (other != name && entry.tokens.size() <= tokens.size() &&
                std::equal(entry.tokens.begin(), entry.tokens.end(), tokens.begin())) {
                continued.push_back(other);
            }
        }
        for (const std::string& other : continued) {
            entries_.erase(other);
        }
        entries_[name] = {tokens, bytes};
    }
    for (const std::string& other : continued) {
        fs::remove(folder_ / other, ignored);
    }
    make_room(bytes, name);
    return true;
}

// Removes least recently used session files, of whatever origin, until they and `keep` together take no more than the limit.
void SessionFolder::make_room(int64_t bytes, const std::string& keep) {
    struct File {
        fs::file_time_type used;
        std::string name;
        int64_t bytes = 0;
    };
    std::vector<File> files;
    int64_t total = bytes;
    std::error_code failed;
    for (fs::directory_iterator at(folder_, failed); !failed && at != fs::directory_iterator(); at.increment(failed)) {
        const std::string name = at->path().filename().string();
        std::error_code gone; // another process may remove files too
        if (name == keep || at->path().extension() != kExtension || !fs::is_regular_file(at->symlink_status(gone))) {
            continue;
        }
        File file{fs::last_write_time(at->path(), gone), name, 0};
        const auto size = gone ? 0 : fs::file_size(at->path(), gone);
        if (!gone) {
            file.bytes = static_cast<int64_t>(size);
            total += file.bytes;
            files.push_back(file);
        }
    }
    std::sort(files.begin(), files.end(), [](const File& a, const File& b) { return a.used < b.used; });
    for (const File& file : files) {
        if (total <= limit_bytes_) {
            break;
        }
        std::error_code ignored;
        forget(file.name);
        if (fs::remove(folder_ / file.name, ignored)) {
            total -= file.bytes;
        }
    }
}

SessionFolder::Contents SessionFolder::contents() const {
    const std::lock_guard lock(mutex_);
    Contents result;
    for (const auto& [name, entry] : entries_) {
        ++result.files;
        result.bytes += entry.bytes;
    }
    return result;
}

} // namespace turboquant::llm
