// A conversation: messages, the text and tokens they became, and what happens when the context is full.
#pragma once

#include "llm/chat_template.h"
#include "llm/session.h"

#include <functional>
#include <string>
#include <vector>

namespace turboquant::llm {

struct AskOptions {
    SamplingOptions sampling;
    int64_t limit = -1;     // tokens of an answer
    bool make_room = false; // context full: forget the oldest turns; otherwise stop
    Progress progress;      // reading the prompt
    std::function<void(const std::string&)> on_text;
    std::function<void(const std::string&)> on_notice; // one line for the user: what was done about a full context
};

class Conversation {
public:
    explicit Conversation(Session& session);

    const std::vector<Message>& messages() const { return messages_; }
    const ChatTemplate& chat_template() const { return template_; }
    Session& session() { return session_; }

    // Answers `text`. An interrupted answer is kept as far as it came; interrupted while the prompt was read, the
    // question is taken back. Error: nothing changed but the cache.
    Answer ask(const std::string& text, const AskOptions& options);
    // Another answer to the last question. UsageError if there is none.
    Answer regenerate(const AskOptions& options);

    void reset();                             // forgets all but the system message
    void set_system(const std::string& text); // and starts over; empty: none

    // One file with messages and the cache's state (session_archive.h). Error names the file.
    void save(const std::string& path) const;
    // Returns what became of it, in one line that names the file: whether the cache was restored or has to be read again, and why.
    // Error, and nothing changed: cannot be read, or (DamagedSession) holds no messages that could be trusted.
    std::string load(const std::string& path);

private:
    Answer answer(const AskOptions& options);
    std::vector<Token> prompt_tokens(const AskOptions& options);
    std::vector<Token> shorten(const std::string& why, int64_t room, const AskOptions& options);
    bool make_room(const AskOptions& options, std::vector<Token>& tokens);
    int64_t keep_tokens() const;

    Session& session_;
    ChatTemplate template_;
    std::vector<Message> messages_;
    // tokens_ is what text_ became; text_ is a prefix of what the messages render to, or empty when nothing is known.
    std::string text_;
    std::vector<Token> tokens_;
    // Where each question (with what the template puts before it) begins. Empty where that is not known any more.
    struct Turn {
        int64_t token = 0; // in tokens_
        size_t text = 0;   // in text_
    };
    std::vector<Turn> turns_;
};

} // namespace turboquant::llm
