// Conversation::save and load: a session archive whose note holds the messages. They alone are enough to go on; the state saves
// the reading.
#include "llm/conversation.h"
#include "llm/error.h"
#include "llm/session_archive.h"

#include <algorithm>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

namespace turboquant::llm {

using nlohmann::json;

void Conversation::save(const std::string& path) const {
    json messages = json::array();
    for (const Message& message : messages_) {
        messages.push_back({{"role", message.role}, {"content", message.content}});
    }
    json turns = json::array();
    for (const Turn& turn : turns_) {
        turns.push_back({turn.token, turn.text});
    }
    const std::string note =
        json{{"messages", messages}, {"text", text_}, {"tokens", tokens_}, {"turns", turns}}.dump();
    write_session(path, session_origin(session_.model(), session_.kv()), note, session_.cached(), session_.state());
}

std::string Conversation::load(const std::string& path) {
    SessionHead head;
    try {
        head = read_session_head(path);
    } catch (const DamagedSession& error) {
        throw DamagedSession(fmt::format("{}; choose another file", error.what()));
    }
    if (head.note.empty()) {
        throw Error(
            fmt::format("{}: a session of tq serve, which keeps no messages; choose a file that /save wrote", path));
    }
    const DamagedSession not_ours(
        fmt::format("{}: damaged: its messages are not what tq writes; choose another file", path));
    std::vector<Message> messages;
    std::string text;
    std::vector<Token> tokens;
    std::vector<Turn> turns;
    try {
        const json root = json::parse(head.note);
        for (const json& message : root.at("messages")) {
            messages.push_back({message.at("role").get<std::string>(), message.at("content").get<std::string>()});
        }
        for (const json& turn : root.at("turns")) {
            turns.push_back({turn.at(0).get<int64_t>(), turn.at(1).get<size_t>()});
        }
        root.at("text").get_to(text);
        root.at("tokens").get_to(tokens);
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
    std::string obstacle = session_origin(session_.model(), session_.kv()).obstacle(head.origin);
    if (obstacle.empty() && (!known(tokens) || !known(head.tokens))) {
        obstacle = "its tokens are not the model's";
    }
    if (obstacle.empty()) {
        try {
            if (!session_.restore(read_session_state(path, head), head.tokens)) {
                obstacle = "its cache does not fit into this context";
            }
        } catch (const DamagedSession&) {
            obstacle = "its cache is damaged";
        }
    }
    if (!obstacle.empty()) {
        return fmt::format("{}: loaded {} messages; all of it will be read again with the next question ({})", path,
                           messages_.size(), obstacle);
    }
    text_ = std::move(text);
    tokens_ = std::move(tokens);
    turns_ = std::move(turns);
    return fmt::format("{}: loaded {} messages and their cache of {} tokens; nothing has to be read again", path,
                       messages_.size(), session_.cached().size());
}

} // namespace turboquant::llm
