#include "serve/http/auth.h"

#include "llm/error.h"

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstring>
#include <fstream>

#include <arpa/inet.h>
#include <sys/stat.h>

#include <fmt/format.h>

namespace turboquant::serve {

bool same_secret(std::string_view given, std::string_view secret) {
    // volatile: the compiler must not find out early either.
    volatile unsigned different = given.size() == secret.size() ? 0 : 1;
    for (size_t i = 0; i < given.size(); ++i) {
        const char expected = secret.empty() ? '\0' : secret[i % secret.size()];
        different = different | static_cast<unsigned>(static_cast<unsigned char>(given[i] ^ expected));
    }
    return different == 0;
}

std::vector<std::string> read_key_file(const std::string& path) {
    std::ifstream file(path);
    if (!file) {
        throw llm::Error(fmt::format("{}: cannot be opened: {}; check --api-key-file", path, std::strerror(errno)));
    }
    struct stat info = {};
    if (::stat(path.c_str(), &info) == 0 && S_ISREG(info.st_mode) && (info.st_mode & 077) != 0) {
        throw llm::Error(fmt::format("{}: other users may read this key file; chmod 600 it", path));
    }
    std::vector<std::string> keys;
    for (std::string line; std::getline(file, line);) {
        while (!line.empty() && std::isspace(static_cast<unsigned char>(line.back())) != 0) {
            line.pop_back();
        }
        if (!line.empty() && line.front() != '#') {
            keys.push_back(line);
        }
    }
    if (keys.empty()) {
        throw llm::Error(fmt::format("{}: holds no key; write one a line", path));
    }
    return keys;
}

bool Auth::allows(std::string_view authorization) const {
    if (!needed()) {
        return true;
    }
    constexpr std::string_view kScheme = "bearer ";
    const bool bearer = authorization.size() > kScheme.size() &&
                        std::equal(kScheme.begin(), kScheme.end(), authorization.begin(),
                                   [](char a, char b) { return a == std::tolower(static_cast<unsigned char>(b)); });
    const std::string_view given = bearer ? authorization.substr(kScheme.size()) : std::string_view();
    bool allowed = false;
    for (const std::string& key : keys_) { // all of them, found or not
        allowed = same_secret(given, key) || allowed;
    }
    return allowed && !given.empty();
}

std::string host_name(std::string_view header) {
    if (!header.empty() && header.front() == '[') {
        header = header.substr(1, header.find(']') == std::string_view::npos ? 0 : header.find(']') - 1);
    } else {
        header = header.substr(0, header.find(':'));
    }
    std::string name(header);
    std::transform(name.begin(), name.end(), name.begin(),
                   [](char c) { return static_cast<char>(std::tolower(static_cast<unsigned char>(c))); });
    return name;
}

bool is_loopback(std::string_view name) {
    const std::string text(name);
    in_addr v4 = {};
    in6_addr v6 = {};
    if (inet_pton(AF_INET, text.c_str(), &v4) == 1) {
        return (ntohl(v4.s_addr) >> 24) == 127;
    }
    if (inet_pton(AF_INET6, text.c_str(), &v6) == 1) {
        return IN6_IS_ADDR_LOOPBACK(&v6) != 0;
    }
    return text == "localhost" || text == "localhost.";
}

std::string_view origin_host(std::string_view origin) {
    for (const std::string_view scheme : {"http://", "https://"}) {
        if (origin.substr(0, scheme.size()) == scheme) {
            return origin.substr(scheme.size());
        }
    }
    return {};
}

} // namespace turboquant::serve
