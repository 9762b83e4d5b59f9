#include "serve/http/request_log.h"

#include "serve/http/api_error.h"

#include <cstdio>
#include <ctime>

#include <fmt/format.h>

namespace turboquant::serve {
namespace {

using nlohmann::json;

std::string now() {
    const auto time = std::chrono::system_clock::now();
    const std::time_t seconds = std::chrono::system_clock::to_time_t(time);
    const auto ms = std::chrono::duration_cast<std::chrono::milliseconds>(time.time_since_epoch()).count() % 1000;
    std::tm utc = {};
    gmtime_r(&seconds, &utc);
    char text[32];
    std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S", &utc);
    return fmt::format("{}.{:03}Z", text, ms);
}

// A path or an error comes from outside: no control characters on somebody's terminal.
std::string printable(const std::string& text) {
    const std::string quoted = dump(json(text));
    return quoted.substr(1, quoted.size() - 2);
}

} // namespace

void RequestLog::write(const std::string& line) {
    const std::lock_guard lock(mutex_);
    std::fputs((line + "\n").c_str(), stderr);
    std::fflush(stderr);
}

void RequestLog::request(const RequestRecord& record) {
    const double ms =
        std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - record.start).count();
    if (format_ == Format::json) {
        json line = {{"time", now()},       {"level", "info"},         {"event", "request"},
                     {"id", record.id},     {"remote", record.remote}, {"method", record.method},
                     {"path", record.path}, {"status", record.status}, {"ms", ms}};
        if (record.prompt_tokens) {
            line["prompt_tokens"] = *record.prompt_tokens;
            line["cached_tokens"] = record.cached_tokens;
            line["completion_tokens"] = record.answer_tokens;
        }
        for (const auto& [key, value] :
             {std::pair{"outcome", &record.outcome}, {"error", &record.error}, {"prompt", &record.prompt}}) {
            if (!value->empty()) {
                line[key] = *value;
            }
        }
        write(dump(line));
    } else if (format_ == Format::text) {
        std::string line = fmt::format("{} {} {} {} {} {} {:.0f} ms", now(), record.id, record.remote, record.method,
                                       printable(record.path), record.status, ms);
        if (record.prompt_tokens) {
            line += fmt::format(", prompt {} ({} cached), answer {}", *record.prompt_tokens, record.cached_tokens,
                                record.answer_tokens);
        }
        for (const std::string* word : {&record.outcome, &record.error}) {
            if (!word->empty()) {
                line += ", " + printable(*word);
            }
        }
        if (!record.prompt.empty()) {
            line += ", " + dump(json(record.prompt));
        }
        write(line);
    }
}

void RequestLog::notice(const std::string& message) {
    if (format_ == Format::json) {
        write(dump({{"time", now()}, {"level", "info"}, {"event", "notice"}, {"message", message}}));
    } else {
        write(message);
    }
}

void RequestLog::failure(const std::string& id, const std::string& message) {
    if (format_ == Format::json) {
        write(dump({{"time", now()}, {"level", "error"}, {"event", "failure"}, {"id", id}, {"message", message}}));
    } else {
        write(fmt::format("{} {} error: {}", now(), id, printable(message)));
    }
}

} // namespace turboquant::serve
