// Reading a request's JSON: every wrong type or range is a 400 that names the field.
#pragma once

#include "serve/http/api_error.h"

#include <cstdint>
#include <optional>
#include <string>

namespace turboquant::serve {

// A request body: one object, at most kDeepest levels deep. ApiError otherwise.
nlohmann::json parse_body(const std::string& body);

class Fields {
public:
    explicit Fields(const nlohmann::json& object) : object_(object) {}

    // null counts as absent, as in OpenAI's API.
    const nlohmann::json* find(const char* name) const;

    std::optional<double> number(const char* name, double low, double high) const;
    std::optional<int64_t> integer(const char* name, int64_t low, int64_t high) const;
    std::optional<bool> boolean(const char* name) const;
    std::optional<std::string> string(const char* name) const;

private:
    const nlohmann::json& object_;
};

// "a string", "an array", ...
std::string type_words(const nlohmann::json& value);

} // namespace turboquant::serve
