// Conversation::save and load. The file: a magic line, the length of a JSON text (8 bytes, little endian), the JSON
// text, the state of the cache as libllama wrote it. The JSON alone is enough to go on; the state saves the reading.
#include "llm/conversation.h"
#include "llm/error.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace turboquant::llm {
namespace {

using nlohmann::json;
constexpr char kMagic[] = "TQCHAT 1\n";
constexpr size_t kMagicBytes = sizeof kMagic - 1;

// FNV-1a: a damaged state must not reach libllama, which trusts what it reads.
uint64_t checksum(const std::vector<uint8_t>& bytes) {
    uint64_t hash = 0xcbf29ce484222325U;
    for (const uint8_t byte : bytes) {
        hash = (hash ^ byte) * 0x100000001b3U;
    }
    return hash;
}

} // namespace

void Conversation::save(const std::string& path) const {
    const std::vector<uint8_t> state = session_.state();
    json messages = json::array();
    for (const Message& message : messages_) {
        messages.push_back({{"role", message.role}, {"content", message.content}});
    }
    json turns = json::array();
    for (const Turn& turn : turns_) {
        turns.push_back({turn.token, turn.text});
    }
    const std::string head = json{
        {"model", session_.model().identity()},
        {"kv", session_.kv().describe()},
        {"messages", messages},
        {"text", text_},
        {"tokens", tokens_},
        {"turns", turns},
        {"cached", session_.cached()},
        {"state_bytes", state.size()},
        {"state_checksum",
         checksum(state)}}.dump();
    // Written beside the old file and moved over it, so that a full disk does not cost the old one.
    const std::string part = path + ".part";
    std::ofstream file(part, std::ios::binary | std::ios::trunc);
    uint8_t length[8];
    for (int i = 0; i < 8; ++i) {
        length[i] = static_cast<uint8_t>(static_cast<uint64_t>(head.size()) >> (8 * i));
    }
    file.write(kMagic, kMagicBytes);
    file.write(reinterpret_cast<const char*>(length), sizeof length);
    file.write(head.data(), static_cast<std::streamsize>(head.size()));
    file.write(reinterpret_cast<const char*>(state.data()), static_cast<std::streamsize>(state.size()));
    file.close();
    std::error_code failed;
    if (file) {
        std::filesystem::rename(part, path, failed);
    }
    if (!file || failed) {
        const std::string reason = failed ? failed.message() : std::strerror(errno);
        std::filesystem::remove(part, failed);
        throw Error(fmt::format("{}: cannot be written: {}; choose another place", path, reason));
    }
}

std::string Conversation::load(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) {
        throw Error(fmt::format("{}: cannot be opened: {}; check the path", path, std::strerror(errno)));
    }
    const Error not_ours(fmt::format("{}: not a conversation that /save wrote, or damaged; choose another file", path));
    char magic[kMagicBytes] = {};
    uint8_t length[8] = {};
    file.read(magic, sizeof magic);
    file.read(reinterpret_cast<char*>(length), sizeof length);
    std::error_code failed;
    const uint64_t file_bytes = std::filesystem::file_size(path, failed);
    uint64_t head_bytes = 0;
    for (int i = 0; i < 8; ++i) {
        head_bytes |= static_cast<uint64_t>(length[i]) << (8 * i);
    }
    if (!file || failed || std::memcmp(magic, kMagic, kMagicBytes) != 0 || head_bytes > file_bytes) {
        throw not_ours;
    }
    std::string head(head_bytes, '\0');
    file.read(head.data(), static_cast<std::streamsize>(head.size()));
    std::vector<Message> messages;
    std::string text;
    std::vector<Token> tokens;
    std::vector<Token> cached;
    std::vector<Turn> turns;
    std::string model;
    std::string kv;
    uint64_t state_bytes = 0;
    uint64_t state_checksum = 0;
    try {
        const json root = json::parse(head);
        for (const json& message : root.at("messages")) {
            messages.push_back({message.at("role").get<std::string>(), message.at("content").get<std::string>()});
        }
        for (const json& turn : root.at("turns")) {
            turns.push_back({turn.at(0).get<int64_t>(), turn.at(1).get<size_t>()});
        }
        root.at("text").get_to(text);
        root.at("tokens").get_to(tokens);
        root.at("cached").get_to(cached);
        root.at("model").get_to(model);
        root.at("kv").get_to(kv);
        root.at("state_bytes").get_to(state_bytes);
        root.at("state_checksum").get_to(state_checksum);
    } catch (const json::exception&) {
        throw not_ours;
    }
    const int32_t vocabulary = llama_vocab_n_tokens(session_.model().vocab());
    const auto known = [&](const std::vector<Token>& list) {
        return std::all_of(list.begin(), list.end(), [&](Token token) { return token >= 0 && token < vocabulary; });
    };
    for (const Turn& turn : turns) {
        if (turn.token < 0 || turn.token > static_cast<int64_t>(tokens.size()) || turn.text > text.size()) {
            throw not_ours;
        }
    }

    messages_ = std::move(messages);
    text_.clear();
    tokens_.clear();
    turns_.clear();
    session_.clear();
    std::string obstacle;
    if (model != session_.model().identity()) {
        obstacle = "it was saved with another model";
    } else if (kv != session_.kv().describe()) {
        obstacle = "it was saved with another cache, " + kv;
    } else if (!known(tokens) || !known(cached) || state_bytes > file_bytes) {
        obstacle = "its cache is damaged";
    } else {
        std::vector<uint8_t> state(state_bytes);
        file.read(reinterpret_cast<char*>(state.data()), static_cast<std::streamsize>(state.size()));
        if (!file || checksum(state) != state_checksum) {
            obstacle = "its cache is damaged";
        } else if (!session_.restore(state, cached)) {
            obstacle = "its cache does not fit into this context";
        }
    }
    if (!obstacle.empty()) {
        return fmt::format("loaded {} messages; all of it will be read again with the next question ({})",
                           messages_.size(), obstacle);
    }
    text_ = std::move(text);
    tokens_ = std::move(tokens);
    turns_ = std::move(turns);
    return fmt::format("loaded {} messages and their cache of {} tokens; nothing has to be read again",
                       messages_.size(), session_.cached().size());
}

} // namespace turboquant::llm
