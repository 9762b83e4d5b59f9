// Who may ask: API keys, and what browsers of other sites may not.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace turboquant::serve {

// Compares without telling by its time how much of `given` is right (its length may show).
bool same_secret(std::string_view given, std::string_view secret);

// One key a line; empty lines and lines that start with # are skipped. Error that names the file; also when it has no key
// or others may read it.
std::vector<std::string> read_key_file(const std::string& path);

class Auth {
public:
    explicit Auth(std::vector<std::string> keys) : keys_(std::move(keys)) {}
    bool needed() const { return !keys_.empty(); }
    // authorization: the header's value, "Bearer KEY".
    bool allows(std::string_view authorization) const;

private:
    std::vector<std::string> keys_;
};

// "localhost:8080" -> "localhost", "[::1]:8080" -> "::1"; lower case.
std::string host_name(std::string_view host_header);
// localhost, 127.x.y.z, ::1.
bool is_loopback(std::string_view name);
// The host of an Origin header ("http://localhost:8080" -> "localhost:8080"); empty for "null" and others.
std::string_view origin_host(std::string_view origin);

} // namespace turboquant::serve
