// Messages into the text that the model was trained on.
#pragma once

#include "llm/model.h"

#include <string>
#include <vector>

namespace turboquant::llm {

struct Message {
    std::string role; // system, user, assistant
    std::string content;
};

class ChatTemplate {
public:
    // own: the model's, as far as libllama knows it. chatml: the model has one that libllama does not know.
    // none: the model has none, so it continues plain text.
    enum class Kind { own, chatml, none };

    explicit ChatTemplate(const Model& model);
    Kind kind() const { return kind_; }

    // open_answer: end with what starts the assistant's answer. A text without open_answer whose last message is the
    // assistant's is a prefix of what later messages give (most templates; callers must not rely on it).
    std::string render(const std::vector<Message>& messages, bool open_answer) const;

    // The system message that the model's own template puts where none is given (Qwen2.5, SmolLM2, ...), which libllama's
    // built-in version of the template leaves out. Empty if there is none.
    const std::string& default_system() const { return default_system_; }

private:
    Kind kind_ = Kind::none;
    std::string source_;
    std::string default_system_;
};

} // namespace turboquant::llm
