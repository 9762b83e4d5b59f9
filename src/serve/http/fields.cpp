#include "serve/http/fields.h"

#include <fmt/format.h>

namespace turboquant::serve {
namespace {

using nlohmann::json;
constexpr int kDeepest = 32;

[[noreturn]] void wrong_type(const char* name, const char* wanted, const json& value) {
    throw bad_request(fmt::format("'{}' must be {}, not {}", name, wanted, type_words(value)), name, "invalid_type");
}

} // namespace

std::string type_words(const json& value) {
    switch (value.type()) {
    case json::value_t::null: return "null";
    case json::value_t::object: return "an object";
    case json::value_t::array: return "an array";
    case json::value_t::string: return "a string";
    case json::value_t::boolean: return "a boolean";
    case json::value_t::number_float: return "a number with a fraction";
    case json::value_t::number_integer:
    case json::value_t::number_unsigned: return "an integer";
    default: return "something else";
    }
}

json parse_body(const std::string& body) {
    json parsed;
    try {
        parsed = json::parse(body, [](int depth, json::parse_event_t, json&) {
            if (depth > kDeepest) {
                throw bad_request(fmt::format("the JSON body is more than {} levels deep", kDeepest));
            }
            return true;
        });
    } catch (const json::parse_error& error) {
        throw bad_request(fmt::format("the body is not valid JSON (byte {})", error.byte));
    } catch (const json::exception&) { // a number that no double holds
        throw bad_request("the body has a number that is too large");
    }
    if (!parsed.is_object()) {
        throw bad_request(fmt::format("the body must be a JSON object, not {}", type_words(parsed)));
    }
    return parsed;
}

const json* Fields::find(const char* name) const {
    const auto found = object_.find(name);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
}

std::optional<double> Fields::number(const char* name, double low, double high) const {
    const json* value = find(name);
    if (value == nullptr) {
        return std::nullopt;
    }
    if (!value->is_number()) {
        wrong_type(name, "a number", *value);
    }
    const double number = value->get<double>();
    if (!(number >= low && number <= high)) {
        throw bad_request(fmt::format("'{}' must be from {} to {}, not {}", name, low, high, number), name,
                          "out_of_range");
    }
    return number;
}

std::optional<int64_t> Fields::integer(const char* name, int64_t low, int64_t high) const {
    const json* value = find(name);
    if (value == nullptr) {
        return std::nullopt;
    }
    if (!value->is_number_integer()) {
        wrong_type(name, "an integer", *value);
    }
    const bool huge = value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX);
    const int64_t number = huge ? INT64_MAX : value->get<int64_t>();
    if (huge || number < low || number > high) {
        throw bad_request(fmt::format("'{}' must be from {} to {}, not {}", name, low, high, value->dump()), name,
                          "out_of_range");
    }
    return number;
}

std::optional<bool> Fields::boolean(const char* name) const {
    const json* value = find(name);
    if (value == nullptr) {
        return std::nullopt;
    }
    if (!value->is_boolean()) {
        wrong_type(name, "a boolean", *value);
    }
    return value->get<bool>();
}

std::optional<std::string> Fields::string(const char* name) const {
    const json* value = find(name);
    if (value == nullptr) {
        return std::nullopt;
    }
    if (!value->is_string()) {
        wrong_type(name, "a string", *value);
    }
    return value->get<std::string>();
}

} // namespace turboquant::serve
