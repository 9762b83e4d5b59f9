#include "llm/chat_template.h"

#include "llm/error.h"

namespace turboquant::llm {

ChatTemplate::ChatTemplate(const Model& model) {
    const char* source = llama_model_chat_template(model.get(), nullptr);
    if (source == nullptr || *source == '\0') {
        return;
    }
    const llama_chat_message probe = {"user", "x"};
    kind_ = llama_chat_apply_template(source, &probe, 1, true, nullptr, 0) >= 0 ? Kind::own : Kind::chatml;
    source_ = kind_ == Kind::own ? source : "chatml";
}

std::string ChatTemplate::render(const std::vector<Message>& messages, bool open_answer) const {
    if (kind_ == Kind::none) {
        std::string text;
        for (const Message& message : messages) {
            if (!text.empty() && message.role != "assistant") {
                text += '\n';
            }
            text += message.content;
        }
        return text;
    }
    std::vector<llama_chat_message> views;
    size_t bytes = 1024;
    for (const Message& message : messages) {
        views.push_back({message.role.c_str(), message.content.c_str()});
        bytes += 2 * message.content.size() + 256;
    }
    std::string text(bytes, '\0');
    const auto apply = [&] {
        return llama_chat_apply_template(source_.c_str(), views.data(), views.size(), open_answer, text.data(),
                                         static_cast<int32_t>(text.size()));
    };
    int32_t n = apply();
    if (n > static_cast<int32_t>(text.size())) {
        text.resize(static_cast<size_t>(n));
        n = apply();
    }
    if (n < 0) {
        throw Error("the model's chat template cannot take these messages; try without --system");
    }
    text.resize(static_cast<size_t>(n));
    return text;
}

} // namespace turboquant::llm
