// An error in OpenAI's shape: {"error": {"message", "type", "param", "code"}}.
#pragma once

#include <stdexcept>
#include <string>

#include <nlohmann/json.hpp>

namespace turboquant::serve {

class ApiError : public std::runtime_error {
public:
    // param: the field that is wrong; code: a word for programs. Empty ones become null.
    ApiError(int http_status, const std::string& message, std::string type, std::string param = "",
             std::string code = "")
        : std::runtime_error(message),
          status_(http_status),
          type_(std::move(type)),
          param_(std::move(param)),
          code_(std::move(code)) {}

    int status() const { return status_; }
    const std::string& code() const { return code_; }
    nlohmann::json json() const;

private:
    int status_;
    std::string type_;
    std::string param_;
    std::string code_;
};

// 400, invalid_request_error.
ApiError bad_request(const std::string& message, const std::string& param = "", const std::string& code = "");

// One line of JSON; whatever is no UTF-8 in it becomes U+FFFD.
std::string dump(const nlohmann::json& json);

} // namespace turboquant::serve
