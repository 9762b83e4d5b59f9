// Parts of tq serve that need no model: stop strings, the text of an answer, which slot a prompt goes to, how much of a
// prompt a step reads, request parsing, keys and origins.
#include "serve/engine/answer_text.h"
#include "serve/engine/prefix_cache.h"
#include "serve/engine/step_budget.h"
#include "serve/engine/stop_matcher.h"
#include "serve/http/auth.h"
#include "serve/http/fields.h"
#include "serve/http/openai_request.h"
#include "serve/http/page.h"

#include "llm/error.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>
#include <random>

#include <sys/stat.h>

namespace turboquant::serve {
namespace {

using nlohmann::json;
using Tokens = std::vector<llm::Token>;

// ---- stop strings

std::string run(StopMatcher& matcher, const std::vector<std::string>& pieces) {
    std::string out;
    for (const std::string& piece : pieces) {
        out += matcher.push(piece);
    }
    return out;
}

TEST(StopMatcher, CutsBeforeTheEarliestAndHoldsBackOnlyWhatCouldBecomeOne) {
    StopMatcher matcher({"END", "\n\n"});
    EXPECT_EQ(matcher.push("hello E"), "hello ");
    EXPECT_EQ(matcher.push("N"), "");
    EXPECT_EQ(matcher.push("T\n"), "ENT");
    EXPECT_FALSE(matcher.stopped());
    EXPECT_EQ(matcher.push("x\n"), "\nx");
    EXPECT_EQ(matcher.push("\nEND"), "");
    EXPECT_TRUE(matcher.stopped());
    EXPECT_EQ(matcher.push("more"), "");
    EXPECT_EQ(matcher.finish(), "");
}

TEST(StopMatcher, WhatWasHeldBackComesAtTheEnd) {
    StopMatcher matcher({"STOP"});
    EXPECT_EQ(run(matcher, {"a ST", "O"}), "a ");
    EXPECT_EQ(matcher.finish(), "STO");
    StopMatcher none({});
    EXPECT_EQ(none.push("as it is"), "as it is");
}

// Whatever the pieces: the text before the first stop string, and at no time a character of it.
TEST(StopMatcher, AnyPiecesGiveTheSame) {
    std::mt19937 random(7);
    for (int round = 0; round < 2000; ++round) {
        const auto word = [&](size_t least, size_t most) {
            std::string text;
            for (size_t n = least + random() % (most - least + 1); n > 0; --n) {
                text += static_cast<char>('a' + random() % 2);
            }
            return text;
        };
        const std::string text = word(0, 24);
        const std::vector<std::string> stops = {word(1, 4), word(3, 6)};
        std::vector<std::string> pieces;
        for (size_t at = 0; at < text.size();) {
            const size_t n = 1 + random() % 3;
            pieces.push_back(text.substr(at, n));
            at += n;
        }
        StopMatcher matcher(stops);
        std::string seen;
        std::string out;
        for (const std::string& piece : pieces) {
            if (matcher.stopped()) {
                break;
            }
            seen += piece;
            out += matcher.push(piece);
        }
        const bool stopped = matcher.stopped();
        out += matcher.finish();
        // A stop string counts as soon as it is complete.
        size_t first = std::string::npos;
        for (const std::string& stop : stops) {
            first = std::min(first, seen.find(stop));
        }
        EXPECT_EQ(stopped, first != std::string::npos) << text;
        EXPECT_EQ(out, seen.substr(0, first)) << text << " stops " << stops[0] << " " << stops[1];
    }
}

// ---- the text of an answer

TokenScore score(const std::string& bytes) {
    return {{0, bytes, -1}, {}};
}

std::string names(const AnswerText::Piece& piece) {
    std::string text;
    for (const TokenScore& s : piece.scores) {
        text += "[" + s.chosen.bytes + "]";
    }
    return text;
}

TEST(AnswerText, NeverCutsACharacter) {
    AnswerText text({});
    EXPECT_EQ(text.push("\xE2\x82", score("1")).text, "");
    const AnswerText::Piece piece = text.push("\xAC!", score("2"));
    EXPECT_EQ(piece.text, "\xE2\x82\xAC!");
    EXPECT_EQ(text.push("\xF0\x9F", {}).text, "");
    EXPECT_EQ(text.finish().text, "\xEF\xBF\xBD");
}

TEST(AnswerText, ScoresGoOutWithTheirText) {
    AnswerText text({"STOP"});
    EXPECT_EQ(names(text.push("Hi ", score("Hi "))), "[Hi ]");
    AnswerText::Piece piece = text.push("ST", score("ST"));
    EXPECT_TRUE(piece.empty());
    piece = text.push("ART", score("ART"));
    EXPECT_EQ(piece.text, "START");
    EXPECT_EQ(names(piece), "[ST][ART]");
    EXPECT_TRUE(text.push(" S", score(" S")).scores.empty());
    piece = text.push("TOP it", score("TOP it"));
    EXPECT_EQ(piece.text, "");
    EXPECT_EQ(names(piece), "[ S]") << "the token whose text was cut in the middle counts, the next does not";
    EXPECT_TRUE(text.stopped());
    EXPECT_TRUE(text.finish().empty());
}

TEST(AnswerText, TheEndGivesWhatWasHeldBack) {
    AnswerText text({"STOP"});
    text.push("a STO", score("a STO"));
    const AnswerText::Piece rest = text.finish();
    EXPECT_EQ(rest.text, "STO");
    EXPECT_EQ(names(rest), "[a STO]");
}

// ---- which slot

Tokens sequence(int first, int n) {
    Tokens tokens;
    for (int i = 0; i < n; ++i) {
        tokens.push_back(first + i);
    }
    return tokens;
}

Tokens operator+(Tokens a, const Tokens& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
}

void expect_placement(const Placement& got, int slot, int64_t keep, int copy_from) {
    EXPECT_EQ(got.slot, slot);
    EXPECT_EQ(got.keep, keep);
    EXPECT_EQ(got.copy_from, copy_from);
}

TEST(Place, AConversationGoesOnInItsSlot) {
    const Tokens a = sequence(0, 100);
    const Tokens b = sequence(1000, 100);
    const Tokens prompt = b + sequence(5000, 20);
    expect_placement(place(prompt, {{a, false, 1}, {b, false, 2}, {{}, false, 0}}, true), 1, 100, -1);
}

TEST(Place, TheLastTokenIsAlwaysRead) {
    const Tokens a = sequence(0, 100);
    expect_placement(place(a, {{a, false, 1}}, true), 0, 99, -1);
}

TEST(Place, SomethingNewTakesAnEmptySlotElseTheLeastRecentlyUsed) {
    const Tokens a = sequence(0, 100);
    const Tokens b = sequence(1000, 100);
    const Tokens prompt = sequence(7000, 30);
    expect_placement(place(prompt, {{a, false, 1}, {b, false, 2}, {{}, false, 0}}, true), 2, 0, -1);
    expect_placement(place(prompt, {{a, false, 5}, {b, false, 2}}, true), 1, 0, -1);
    expect_placement(place(prompt, {{a, true, 5}, {b, true, 2}}, true), -1, 0, -1);
}

TEST(Place, ASharedBeginningIsCopiedSoThatTheOtherConversationStays) {
    const Tokens system = sequence(0, 500);
    const Tokens talk = system + sequence(1000, 900);
    const Tokens other = sequence(9000, 50);
    const Tokens prompt = system + sequence(5000, 20);
    expect_placement(place(prompt, {{talk, false, 3}, {other, false, 1}}, true), 1, 500, 0);
    expect_placement(place(prompt, {{talk, true, 3}, {other, false, 1}}, true), 1, 500, 0); // busy: all the same
    expect_placement(place(prompt, {{talk, true, 3}, {other, false, 1}}, false), 1, 0, -1); // cannot copy
    expect_placement(place(prompt, {{talk, false, 3}, {other, false, 1}}, false), 0, 500, -1);
    expect_placement(place(prompt, {{talk, false, 3}, {other, true, 1}}, true), 0, 500, -1); // nowhere else
}

TEST(Place, AFewCommonTokensAreNotWorthACopyOrAConversation) {
    const Tokens head = sequence(0, 20);
    const Tokens talk = head + sequence(1000, 900);
    const Tokens prompt = head + sequence(5000, 20);
    expect_placement(place(prompt, {{talk, false, 1}, {{}, false, 0}}, true), 1, 0, -1);
}

// ---- the step

TEST(StepBudget, LearnsHowMuchFits) {
    StepBudget budget(0.1, 512);
    EXPECT_EQ(budget.prompt_tokens(0), 512);
    EXPECT_LE(budget.prompt_tokens(2), 64);
    for (int i = 0; i < 50; ++i) {
        budget.record(0, 4, 0.02);          // 20 ms to decode
        budget.record(40, 4, 0.02 + 0.040); // 1 ms a prompt token
    }
    EXPECT_NEAR(static_cast<double>(budget.prompt_tokens(4)), 80, 4);
    EXPECT_EQ(budget.prompt_tokens(0), 512);
    for (int i = 0; i < 50; ++i) {
        budget.record(40, 4, 4); // a machine that cannot keep up
    }
    EXPECT_EQ(budget.prompt_tokens(4), StepBudget::kLeast);
}

// ---- requests

const llm::SamplingOptions kDefaults;

CompletionRequest chat(const std::string& text) {
    return parse_chat(parse_body(text), kDefaults, 1000, -1);
}

CompletionRequest chat_with(const std::string& fields) {
    return chat(R"({"messages":[{"role":"user","content":"x"}],)" + fields + "}");
}

// The error that a body gives: "status param: message"; empty: none.
template <class Parse>
std::string error_of(Parse parse) {
    try {
        parse();
    } catch (const ApiError& error) {
        const json inner = error.json()["error"];
        return std::to_string(error.status()) + " " +
               (inner["param"].is_null() ? "" : inner["param"].get<std::string>()) + ": " +
               inner["message"].get<std::string>();
    }
    return {};
}

TEST(ParseChat, Fields) {
    const CompletionRequest request = chat(
        R"({"model":"any","messages":[{"role":"developer","content":"be brief"},{"role":"user","content":[)"
        R"({"type":"text","text":"a"},{"type":"text","text":"b"}]},{"role":"assistant","content":"c","tool_calls":[]}],)"
        R"("stream":true,"stream_options":{"include_usage":true},"max_tokens":5,"max_completion_tokens":7,"stop":"END",)"
        R"("temperature":0,"top_p":0.5,"top_k":7,"min_p":0.1,"seed":42,"presence_penalty":1,"frequency_penalty":-1,)"
        R"("repeat_penalty":1.1,"logit_bias":{"5":-100,"6":2},"logprobs":true,"top_logprobs":3,"user":"me","n":1,)"
        R"("tools":[],"tool_choice":"auto","response_format":{"type":"text"},"unheard_of":[1,2],"metadata":{}})");
    ASSERT_EQ(request.messages.size(), 3U);
    EXPECT_EQ(request.messages[0].role, "system");
    EXPECT_EQ(request.messages[1].content, "ab");
    EXPECT_TRUE(request.stream);
    EXPECT_TRUE(request.include_usage);
    EXPECT_EQ(request.limit, 7);
    EXPECT_EQ(request.stops, std::vector<std::string>{"END"});
    EXPECT_EQ(request.sampling.temp, 0);
    EXPECT_EQ(request.sampling.top_k, 7);
    EXPECT_EQ(request.sampling.seed, 42U);
    EXPECT_EQ(request.sampling.repeat_penalty, 1.1);
    ASSERT_EQ(request.sampling.bias.size(), 2U);
    EXPECT_LT(request.sampling.bias[0].bias, -1e8F);
    EXPECT_TRUE(request.scores);
    EXPECT_EQ(request.top_scores, 3);
}

TEST(ParseChat, NullCountsAsAbsent) {
    const CompletionRequest request =
        chat_with(R"("temperature":null,"stop":null,"max_tokens":null,"tools":null,"response_format":null,"n":null)");
    EXPECT_EQ(request.sampling.temp, kDefaults.temp);
    EXPECT_EQ(request.limit, -1);
}

TEST(ParseChat, TheServersLimitHolds) {
    const json body = parse_body(R"({"messages":[{"role":"user","content":"x"}],"max_tokens":500})");
    EXPECT_EQ(parse_chat(body, kDefaults, 1000, 100).limit, 100);
    EXPECT_EQ(parse_chat(body, kDefaults, 1000, -1).limit, 500);
}

TEST(ParseChat, WhatWouldChangeTheAnswerIsRefusedByName) {
    const std::pair<const char*, const char*> cases[] = {
        {"tools", R"("tools":[{"type":"function"}])"},
        {"functions", R"("functions":[{}])"},
        {"tool_choice", R"("tool_choice":"required")"},
        {"response_format", R"("response_format":{"type":"json_object"})"},
        {"n", R"("n":2)"},
        {"modalities", R"("modalities":["text","audio"])"},
        {"grammar", R"("grammar":"root ::= x")"},
        {"mirostat", R"("mirostat":2)"},
        {"messages", R"("messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}])"},
        {"messages", R"("messages":[{"role":"tool","content":"x"}])"},
    };
    for (const auto& [param, fields] : cases) {
        const std::string error = error_of([&, &body = fields] { chat_with(body); });
        EXPECT_EQ(error.rfind("400 " + std::string(param) + ":", 0), 0U) << fields << " " << error;
    }
}

TEST(ParseChat, WrongTypesAndRangesAreRefusedByName) {
    const std::pair<const char*, const char*> cases[] = {
        {"temperature", R"("temperature":"hot")"},
        {"temperature", R"("temperature":-1)"},
        {"temperature", R"("temperature":1e999)"},
        {"top_k", R"("top_k":1.5)"},
        {"max_tokens", R"("max_tokens":0)"},
        {"max_tokens", R"("max_tokens":"5")"},
        {"max_completion_tokens", R"("max_completion_tokens":-3)"},
        {"seed", R"("seed":0.5)"},
        {"stop", R"("stop":5)"},
        {"stop", R"("stop":["a",5])"},
        {"stop", R"("stop":"")"},
        {"stream", R"("stream":"yes")"},
        {"stream_options", R"("stream_options":true)"},
        {"logit_bias", R"("logit_bias":[1])"},
        {"logit_bias", R"("logit_bias":{"x":1})"},
        {"logit_bias", R"("logit_bias":{"1000":1})"},
        {"logit_bias", R"("logit_bias":{"1":101})"},
        {"logprobs", R"("logprobs":3)"},
        {"top_logprobs", R"("top_logprobs":3)"},
        {"top_logprobs", R"("logprobs":true,"top_logprobs":21)"},
        {"user", R"("user":5)"},
        {"model", R"("model":5)"},
        {"n", R"("n":"1")"},
        {"messages", R"("messages":"hello")"},
        {"messages", R"("messages":[])"},
        {"messages", R"("messages":["hello"])"},
        {"messages", R"("messages":[{"content":"x"}])"},
        {"messages", R"("messages":[{"role":"user"}])"},
        {"messages", R"("messages":[{"role":"user","content":5}])"},
        {"messages", R"("messages":[{"role":"user","content":[5]}])"},
        {"messages", "\"messages\":[{\"role\":\"user\",\"content\":\"a\\u0000b\"}]"},
    };
    for (const auto& [param, fields] : cases) {
        const std::string body = R"({"messages":[{"role":"user","content":"x"}],)" + std::string(fields) + "}";
        std::string error = error_of([&] { chat(body); });
        // A number that no double holds is no JSON to the parser.
        const bool named = error.rfind("400 " + std::string(param) + ":", 0) == 0 ||
                           (std::string(fields).find("1e999") != std::string::npos && error.rfind("400 ", 0) == 0);
        EXPECT_TRUE(named) << fields << " gave '" << error << "'";
    }
    EXPECT_EQ(error_of([] { parse_chat(parse_body("{}"), kDefaults, 10, -1); }).rfind("400 messages:", 0), 0U);
}

TEST(ParseBody, OnlyObjectsOfSensibleDepth) {
    EXPECT_NE(error_of([] { parse_body(""); }), "");
    EXPECT_NE(error_of([] { parse_body("{"); }), "");
    EXPECT_NE(error_of([] { parse_body("[1]"); }), "");
    EXPECT_NE(error_of([] { parse_body("{\"a\":\"\xff\"}"); }), "");
    EXPECT_NE(error_of([] { parse_body(R"({"a":)" + std::string(100000, '[')); }), "");
    EXPECT_EQ(error_of([] { parse_body(R"({"a":[[{"b":1}]]})"); }), "");
}

TEST(ParseCompletion, Prompts) {
    const auto completion = [](const std::string& text) {
        return parse_completion(parse_body(text), kDefaults, 1000, -1);
    };
    EXPECT_EQ(completion(R"({"prompt":"hello","logprobs":2})").prompt, "hello");
    EXPECT_EQ(completion(R"({"prompt":"hello","logprobs":2})").top_scores, 2);
    EXPECT_FALSE(completion(R"({"prompt":"hello"})").scores);
    EXPECT_EQ(completion(R"({"prompt":["hello"]})").prompt, "hello");
    EXPECT_EQ(completion(R"({"prompt":[1,2,3]})").tokens, (Tokens{1, 2, 3}));
    EXPECT_EQ(completion(R"({"prompt":[[1,2,3]]})").tokens, (Tokens{1, 2, 3}));
    for (const char* body : {R"({})", R"({"prompt":5})", R"({"prompt":["a","b"]})", R"({"prompt":[1000]})",
                             R"({"prompt":[1,"a"]})", R"({"prompt":[]})"}) {
        EXPECT_EQ(error_of([&] { completion(body); }).rfind("400 prompt:", 0), 0U) << body;
    }
    for (const char* field : {"echo", "suffix", "best_of"}) {
        const std::string value = field == std::string("echo")     ? "true"
                                  : field == std::string("suffix") ? "\"x\""
                                                                   : "2";
        const std::string body = R"({"prompt":"a",")" + std::string(field) + "\":" + value + "}";
        EXPECT_EQ(error_of([&] { completion(body); }).rfind("400 " + std::string(field) + ":", 0), 0U) << body;
    }
}

// ---- who may ask

TEST(Auth, Keys) {
    EXPECT_TRUE(same_secret("abc", "abc"));
    for (const char* wrong : {"abd", "ab", "abcd", "", "abcabc"}) {
        EXPECT_FALSE(same_secret(wrong, "abc")) << wrong;
    }
    EXPECT_FALSE(same_secret("abc", ""));
    const Auth auth({"one", "two"});
    EXPECT_TRUE(auth.allows("Bearer two"));
    EXPECT_TRUE(auth.allows("bearer one"));
    for (const char* wrong : {"", "Bearer", "Bearer ", "Bearer three", "two", "Basic two", "Bearer two "}) {
        EXPECT_FALSE(auth.allows(wrong)) << wrong;
    }
    EXPECT_TRUE(Auth({}).allows(""));
}

TEST(Auth, KeyFile) {
    const std::string path = testing::TempDir() + "keys_" + std::to_string(::getpid());
    std::ofstream(path) << "# comment\nfirst \r\n\nsecond";
    ::chmod(path.c_str(), 0644);
    EXPECT_THROW(read_key_file(path), llm::Error);
    ::chmod(path.c_str(), 0600);
    EXPECT_EQ(read_key_file(path), (std::vector<std::string>{"first", "second"}));
    std::ofstream(path) << "\n";
    EXPECT_THROW(read_key_file(path), llm::Error);
    std::remove(path.c_str());
    EXPECT_THROW(read_key_file(path), llm::Error);
}

TEST(Auth, HostsAndOrigins) {
    EXPECT_EQ(host_name("LocalHost:8080"), "localhost");
    EXPECT_EQ(host_name("[::1]:80"), "::1");
    EXPECT_EQ(host_name("["), "");
    EXPECT_EQ(host_name("127.0.0.1"), "127.0.0.1");
    for (const char* name : {"localhost", "127.0.0.1", "127.1.2.3", "::1"}) {
        EXPECT_TRUE(is_loopback(name)) << name;
    }
    for (const char* name :
         {"", "example.org", "localhost.example.org", "127.0.0.1.example.org", "0.0.0.0", "10.0.0.1"}) {
        EXPECT_FALSE(is_loopback(name)) << name;
    }
    EXPECT_EQ(origin_host("http://localhost:8080"), "localhost:8080");
    EXPECT_EQ(origin_host("null"), "");
}

TEST(Page, OnlyItsOwnBlocksRun) {
    const Page page = make_page();
    EXPECT_NE(page.html.find('<'), std::string::npos);
    EXPECT_EQ(page.html.find("<script>"), std::string::npos);
    EXPECT_EQ(page.html.find("<style>"), std::string::npos);
    EXPECT_NE(page.policy, make_page().policy);
}

} // namespace
} // namespace turboquant::serve
