// A cache's contents as a file: whose they are, the tokens, the state that libllama gave, packed. `tq chat` and `tq serve` keep
// conversations in it. Layout (little endian):
//
//   offset  bytes
//   0       8     "TQSESS\r\n"
//   8       4     version, 1
//   12      4     H, bytes of the head
//   16      8     N, tokens
//   24      8     S, bytes of the state
//   32      8     P, bytes of the packed state
//   40      8     hash_bytes() of the packed state
//   48      8     hash_bytes() of bytes 0..47, the head and the tokens
//   56      H     JSON: {"model", "kv", "host", "note"}
//   56+H    4N    the tokens
//   56+H+4N P     the state as one Zstandard frame (RFC 8878); nothing if S is 0
//
// The plug-in pads its rows of codes to the length of the host's rows, with zeros or with what the next rows hold as well;
// Zstandard takes that out, and the codes' own unevenness.
#pragma once

#include "llm/error.h"
#include "llm/model.h"

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace turboquant::llm {

// What a state belongs to. Where any of it differs the state is useless, or worse.
struct SessionOrigin {
    std::string model; // words and fingerprint
    std::string kv;    // bits and exact rows
    std::string host;  // libllama's version: the layout of a state is its own affair

    // Why a state of that origin is refused here: "it was saved with another model"; empty when it is not.
    std::string obstacle(const SessionOrigin& saved) const;
};
// Reads samples of the model's file. Error when it cannot be read.
SessionOrigin session_origin(const Model& model, const KvChoice& kv);

// The file is not a session, damaged or cut short. One line that begins with its path.
class DamagedSession : public Error {
public:
    using Error::Error;
};

struct SessionHead {
    SessionOrigin origin;
    std::string note; // whatever the writer wants to find again
    std::vector<Token> tokens;
    uint64_t state_bytes = 0;
    // Where the packed state lies.
    uint64_t packed_at = 0;
    uint64_t packed_bytes = 0;
    uint64_t packed_hash = 0;
};

// Writes beside `path` and moves it there when all of it is on the disk, so that neither a full disk nor a lost process costs an
// old file. Readable by its owner only. Returns the file's bytes. Error names the path.
uint64_t write_session(const std::filesystem::path& path, const SessionOrigin& origin, const std::string& note,
                       const std::vector<Token>& tokens, const std::vector<uint8_t>& state);

// Everything but the state; sizes and checksum are right. Error: cannot be read. DamagedSession.
SessionHead read_session_head(const std::filesystem::path& path);
// The state of a file whose head was read, checked. Error: cannot be read. DamagedSession: also when it is not the same file any more.
std::vector<uint8_t> read_session_state(const std::filesystem::path& path, const SessionHead& head);

} // namespace turboquant::llm
