#include "llm/conversation.h"

#include "llm/error.h"

#include <algorithm>

#include <fmt/format.h>

namespace turboquant::llm {
namespace {

// Models put a lot of attention on the first tokens whatever they are: losing them turns answers into noise.
constexpr int64_t kAlwaysKept = 4;
// Room below which a context counts as full before an answer starts.
constexpr int64_t kAnswerRoom = 32;

void notice(const AskOptions& options, const std::string& text) {
    if (options.on_notice) {
        options.on_notice(text);
    }
}

} // namespace

Conversation::Conversation(Session& session) : session_(session), template_(session.model()) {}

void Conversation::reset() {
    std::erase_if(messages_, [](const Message& message) { return message.role != "system"; });
    text_.clear();
    tokens_.clear();
    turns_.clear();
}

void Conversation::set_system(const std::string& text) {
    messages_.clear();
    reset();
    if (!text.empty()) {
        messages_.push_back({"system", text});
    }
}

Answer Conversation::ask(const std::string& text, const AskOptions& options) {
    messages_.push_back({"user", text});
    return answer(options);
}

Answer Conversation::regenerate(const AskOptions& options) {
    if (!messages_.empty() && messages_.back().role == "assistant") {
        messages_.pop_back();
    }
    if (messages_.empty() || messages_.back().role != "user") {
        throw UsageError("/regen: there is no question yet; ask one first");
    }
    // What is before the last question stays as it is in the cache; the question is put to it again.
    if (!turns_.empty()) {
        text_.resize(turns_.back().text);
        tokens_.resize(static_cast<size_t>(turns_.back().token));
        turns_.pop_back();
    }
    return answer(options);
}

// How many tokens at the start survive when room is made: the system message, and never less than kAlwaysKept.
int64_t Conversation::keep_tokens() const {
    int64_t system = 0;
    if (!messages_.empty() && messages_.front().role == "system") {
        const std::vector<Token> tokens = session_.model().tokenize(template_.render({messages_.front()}, false), true);
        system = std::mismatch(tokens.begin(), tokens.end(), tokens_.begin(), tokens_.end()).first - tokens.begin();
    }
    return std::max(system, kAlwaysKept);
}

// Forgets the oldest half after the system message, up to where a question begins, in the cache and in `tokens`
// (which start with what is cached). False: this model's cache cannot, or there is nothing to forget.
bool Conversation::make_room(const AskOptions& options, std::vector<Token>& tokens) {
    const int64_t keep = keep_tokens();
    const auto cached = static_cast<int64_t>(session_.cached().size());
    int64_t discard = (cached - keep) / 2;
    if (discard <= 0 || !session_.can_shift()) {
        return false;
    }
    for (const Turn& turn : turns_) {
        if (turn.token >= keep + discard && turn.token < cached) {
            discard = turn.token - keep;
            break;
        }
    }
    if (!session_.shift(keep, discard)) {
        return false;
    }
    // While an answer is written the cache runs ahead of `tokens`.
    const auto known = static_cast<int64_t>(tokens.size());
    tokens.erase(tokens.begin() + std::min(keep, known), tokens.begin() + std::min(keep + discard, known));
    std::erase_if(turns_, [&](const Turn& turn) { return turn.token < keep + discard; });
    for (Turn& turn : turns_) {
        turn.token -= discard;
    }
    notice(options, fmt::format("context full: forgot the {} oldest tokens after the first {} and went on",
                                format_count(discard), format_count(keep)));
    return true;
}

// Drops the oldest turns from the messages until the rest fits into `room` tokens. The last question always stays.
std::vector<Token> Conversation::shorten(const std::string& why, int64_t room, const AskOptions& options) {
    size_t dropped = 0;
    std::vector<Token> tokens;
    for (;;) {
        text_ = template_.render(messages_, true);
        tokens = session_.model().tokenize(text_, true);
        if (static_cast<int64_t>(tokens.size()) <= room) {
            break;
        }
        const size_t first = !messages_.empty() && messages_.front().role == "system" ? 1 : 0;
        if (messages_.size() - first <= 1) {
            break; // read() says so if even this is too long
        }
        // A question and, where there is one, its answer.
        const size_t n = messages_[first + 1].role == "assistant" ? 2 : 1;
        messages_.erase(messages_.begin() + static_cast<int64_t>(first),
                        messages_.begin() + static_cast<int64_t>(first + std::min(n, messages_.size() - first - 1)));
        ++dropped;
    }
    turns_.clear();
    if (dropped > 0) {
        notice(options, fmt::format("{}: dropped the {} oldest question{} and read the rest again", why, dropped,
                                    dropped == 1 ? "" : "s"));
    }
    return tokens;
}

std::vector<Token> Conversation::prompt_tokens(const AskOptions& options) {
    const std::string text = template_.render(messages_, true);
    const int64_t size = session_.context_size();
    std::vector<Token> tokens;
    const bool continues = !text_.empty() && text.rfind(text_, 0) == 0;
    Turn turn;
    if (continues) {
        tokens = tokens_;
        turn = {static_cast<int64_t>(tokens.size()), text_.size()};
        const std::vector<Token> more = session_.model().tokenize(text.substr(text_.size()), false);
        tokens.insert(tokens.end(), more.begin(), more.end());
    } else {
        tokens = session_.model().tokenize(text, true);
        turns_.clear();
    }
    if (options.make_room && static_cast<int64_t>(tokens.size()) + kAnswerRoom > size) {
        // What the cache holds must be a prefix of the tokens for a shift to mean anything.
        const auto added = static_cast<int64_t>(tokens.size()) - turn.token;
        const std::vector<Token>& cached = session_.cached();
        while (continues && cached.size() <= tokens.size() && added + kAnswerRoom < size / 2 &&
               std::equal(cached.begin(), cached.end(), tokens.begin()) &&
               static_cast<int64_t>(tokens.size()) + kAnswerRoom > size) {
            const size_t before = tokens.size();
            if (!make_room(options, tokens)) {
                break;
            }
            turn.token -= static_cast<int64_t>(before - tokens.size());
        }
        if (static_cast<int64_t>(tokens.size()) + kAnswerRoom > size) {
            return shorten("context full", size / 2, options);
        }
    }
    text_ = text;
    turns_.push_back(turn);
    return tokens;
}

Answer Conversation::answer(const AskOptions& options) {
    // Until the answer is there, nothing is known about what the cache holds beyond the session's own mirror.
    const std::vector<Message> before(messages_.begin(), messages_.end() - 1);
    const std::string text_before = text_;
    const std::vector<Token> tokens_before = tokens_;
    const std::vector<Turn> turns_before = turns_;
    const auto take_back = [&] {
        messages_ = before;
        text_ = text_before;
        tokens_ = tokens_before;
        turns_ = turns_before;
    };
    Answer result;
    try {
        std::vector<Token> tokens = prompt_tokens(options);
        if (!session_.read(tokens, options.progress)) {
            // A shift cannot be undone, so after one the old tokens are no longer what the cache could continue;
            // the common prefix with the cache still makes reading them again as short as it can be.
            take_back();
            result.stop = Stop::interrupted;
            result.stats.context_used = static_cast<int64_t>(session_.cached().size());
            result.stats.context_size = session_.context_size();
            result.stats.kv_bytes = session_.kv_bytes();
            result.stats.kv_f16_bytes = session_.kv_f16_bytes();
            return result;
        }
        tokens_ = std::move(tokens);
        const Sampler sampler = make_sampler(options.sampling);
        result = session_.generate(sampler.get(), options.limit, options.on_text,
                                   [&] { return options.make_room && make_room(options, tokens_); });
    } catch (...) {
        take_back();
        throw;
    }
    tokens_ = session_.cached();
    tokens_.insert(tokens_.end(), result.undecoded.begin(), result.undecoded.end());
    text_ += result.text;
    messages_.push_back({"assistant", result.text});
    return result;
}

} // namespace turboquant::llm
