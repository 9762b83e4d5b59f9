// A folder of session archives, found by what their tokens begin with. Least recently used files make room for new ones.
// Thread-safe.
#pragma once

#include "llm/session_archive.h"

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace turboquant::llm {

// A saved session that shares a beginning with a prompt.
struct SavedPrefix {
    std::string name; // of the file
    int64_t common = 0;
    int64_t tokens = 0; // that the session holds
};

class SessionFolder {
public:
    using Notice = std::function<void(const std::string&)>;

    // Makes the folder for its owner only where there is none. Files of another origin are left alone; they and damaged ones are
    // named to `notice` (one line each; called from whichever thread meets them). limit_bytes: of all session files together.
    // Error: cannot be made or read, or others than its owner may read it.
    SessionFolder(std::filesystem::path folder, SessionOrigin origin, int64_t limit_bytes, Notice notice);

    // The session with the longest common beginning, if loading it costs less than reading what it has beyond the `held`
    // tokens of the prompt that are in a cache already.
    std::optional<SavedPrefix> find(const std::vector<Token>& prompt, int64_t held) const;

    // Tokens and state of a session that find() named; it counts as used now. Absent, with a notice, when it is gone or damaged: it
    // is then not found again.
    struct Loaded {
        std::vector<Token> tokens;
        std::vector<uint8_t> state;
    };
    std::optional<Loaded> load(const std::string& name);

    // What load() gave is of no use here after all: a notice with the reason, and it is not found again. The file stays.
    void refuse(const std::vector<Token>& tokens, std::string_view reason);

    // Keeps a session and drops those it continues, then the least recently used until the limit is kept. False, with a notice, when it
    // cannot be written or is larger than the limit. A session with these very tokens is only touched.
    bool save(const std::vector<Token>& tokens, const std::vector<uint8_t>& state);
    // Whether a session with exactly these tokens is there: saving it again would be of no use.
    bool holds(const std::vector<Token>& tokens) const;

    struct Contents {
        int64_t files = 0;
        int64_t bytes = 0;
    };
    Contents contents() const; // of the files that can be found

    // What the name is made of: nothing but a hash of the tokens.
    static std::string file_name(const std::vector<Token>& tokens);

private:
    void scan();
    void forget(const std::string& name);
    void make_room(int64_t bytes, const std::string& keep);
    void notice(const std::string& line) const;

    std::filesystem::path folder_;
    SessionOrigin origin_;
    int64_t limit_bytes_;
    Notice notice_;
    struct Entry {
        std::vector<Token> tokens;
        int64_t bytes = 0;
    };
    mutable std::mutex mutex_; // of the entries
    std::map<std::string, Entry> entries_;
    std::mutex writing_; // one save at a time
};

} // namespace turboquant::llm
