#include "serve/http/api_error.h"

namespace turboquant::serve {
namespace {

nlohmann::json or_null(const std::string& text) {
    return text.empty() ? nlohmann::json() : nlohmann::json(text);
}

} // namespace

nlohmann::json ApiError::json() const {
    return {{"error", {{"message", what()}, {"type", type_}, {"param", or_null(param_)}, {"code", or_null(code_)}}}};
}

ApiError bad_request(const std::string& message, const std::string& param, const std::string& code) {
    return {400, message, "invalid_request_error", param, code};
}

std::string dump(const nlohmann::json& json) {
    return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

} // namespace turboquant::serve
