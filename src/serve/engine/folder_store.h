// The engine's SessionStore over a folder of session files (llm/session_folder.h): tq serve --session-dir.
#pragma once

#include "serve/engine/session_store.h"

#include "llm/session_folder.h"

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>

namespace turboquant::serve {

// Packing and writing happen on a thread of its own. What waits to be written is found like what is written. Thread-safe.
class FolderStore : public SessionStore {
public:
    // As llm::SessionFolder. Throws llm::Error.
    FolderStore(std::filesystem::path folder, llm::SessionOrigin origin, int64_t limit_bytes,
                llm::SessionFolder::Notice notice);
    ~FolderStore() override; // writes what waits
    FolderStore(const FolderStore&) = delete;
    FolderStore& operator=(const FolderStore&) = delete;

    std::optional<SavedSequence> load(std::span<const llm::Token> tokens, int64_t more_than) override;
    // Waits while kMostWaiting sequences are not written yet: states are large.
    void save(std::span<const llm::Token> tokens, std::vector<uint8_t> state) override;
    // Waits where they are not written yet. The file stays, for whoever can use it.
    void forget(std::span<const llm::Token> tokens, std::string_view reason) override;
    void flush() override;

    llm::SessionFolder::Contents contents() const { return folder_.contents(); }

private:
    using Waiting = std::shared_ptr<const SavedSequence>;
    bool waits(std::span<const llm::Token> tokens) const; // to be written; under the lock
    void write();

    llm::SessionFolder folder_;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<Waiting> waiting_; // the first is being written
    bool ending_ = false;
    std::thread writer_; // last: it uses the others
};

} // namespace turboquant::serve
