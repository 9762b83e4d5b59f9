#include "serve/engine/folder_store.h"

#include <algorithm>
#include <new>

namespace turboquant::serve {
namespace {

constexpr size_t kMostWaiting = 2;

} // namespace

FolderStore::FolderStore(std::filesystem::path folder, llm::SessionOrigin origin, int64_t limit_bytes,
                         llm::SessionFolder::Notice notice)
    : folder_(std::move(folder), std::move(origin), limit_bytes, std::move(notice)), writer_([this] { write(); }) {}

FolderStore::~FolderStore() {
    {
        const std::lock_guard lock(mutex_);
        ending_ = true;
    }
    changed_.notify_all();
    writer_.join();
}

std::optional<SavedSequence> FolderStore::load(std::span<const llm::Token> tokens, int64_t more_than) {
    const std::vector<llm::Token> prompt(tokens.begin(), tokens.end());
    const auto on_disk = folder_.find(prompt, more_than);
    Waiting best;
    int64_t most = on_disk ? on_disk->common : more_than;
    {
        const std::lock_guard lock(mutex_);
        for (const Waiting& candidate : waiting_) {
            const int64_t common = llm::common_prefix(candidate->tokens, prompt);
            if (common > most) {
                most = common;
                best = candidate;
            }
        }
    }
    try {
        if (best != nullptr) {
            return *best;
        }
        if (on_disk) {
            if (auto loaded = folder_.load(on_disk->name)) {
                return SavedSequence{std::move(loaded->tokens), std::move(loaded->state)};
            }
        }
    } catch (const std::bad_alloc&) { // it is read again
    }
    return {};
}

void FolderStore::save(std::span<const llm::Token> tokens, std::vector<uint8_t> state) {
    auto sequence = std::make_shared<SavedSequence>();
    sequence->tokens.assign(tokens.begin(), tokens.end());
    sequence->state = std::move(state);
    if (folder_.holds(sequence->tokens)) {
        return;
    }
    std::unique_lock lock(mutex_);
    if (waits(sequence->tokens)) {
        return;
    }
    changed_.wait(lock, [&] { return waiting_.size() < kMostWaiting; });
    waiting_.push_back(std::move(sequence));
    lock.unlock();
    changed_.notify_all();
}

bool FolderStore::waits(std::span<const llm::Token> tokens) const {
    return std::any_of(waiting_.begin(), waiting_.end(),
                       [&](const Waiting& other) { return std::ranges::equal(other->tokens, tokens); });
}

void FolderStore::forget(std::span<const llm::Token> tokens, std::string_view reason) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return !waits(tokens); });
    folder_.refuse({tokens.begin(), tokens.end()}, reason);
}

void FolderStore::flush() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return waiting_.empty(); });
}

void FolderStore::write() {
    std::unique_lock lock(mutex_);
    for (;;) {
        changed_.wait(lock, [&] { return ending_ || !waiting_.empty(); });
        if (waiting_.empty()) {
            return;
        }
        const Waiting sequence = waiting_.front();
        lock.unlock();
        folder_.save(sequence->tokens, sequence->state); // says itself when it fails
        lock.lock();
        waiting_.pop_front();
        changed_.notify_all();
    }
}

} // namespace turboquant::serve
