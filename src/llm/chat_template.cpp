#include "llm/chat_template.h"

#include "llm/error.h"

namespace turboquant::llm {
namespace {

// A ChatML template that has a default writes it out: '<|im_start|>system\\nYou are ...<|im_end|>'. Anything with code in
// it is not a plain text.
std::string find_default_system(const std::string& source) {
    static const std::string start = "<|im_start|>system";
    for (size_t at = source.find(start); at != std::string::npos; at = source.find(start, at + 1)) {
        size_t begin = at + start.size();
        if (source.compare(begin, 2, "\\n") == 0) {
            begin += 2;
        } else if (source.compare(begin, 1, "\n") == 0) {
            begin += 1;
        } else {
            continue;
        }
        const size_t end = source.find("<|im_end|>", begin);
        if (end == std::string::npos) {
            break;
        }
        const std::string text = source.substr(begin, end - begin);
        if (!text.empty() && text.find_first_of("{}'\"\\+%") == std::string::npos) {
            return text;
        }
    }
    return {};
}

} // namespace

ChatTemplate::ChatTemplate(const Model& model) {
    const char* source = llama_model_chat_template(model.get(), nullptr);
    if (source == nullptr || *source == '\0') {
        return;
    }
    const llama_chat_message probe = {"user", "x"};
    kind_ = llama_chat_apply_template(source, &probe, 1, true, nullptr, 0) >= 0 ? Kind::own : Kind::chatml;
    default_system_ = find_default_system(source);
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
