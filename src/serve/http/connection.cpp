#include "serve/http/connection.h"

#include <charconv>
#include <cstring>
#include <filesystem>
#include <functional>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

namespace turboquant::serve {
namespace {

struct Endpoint {
    std::string address;
    int port = -1;
};

using GetName = int (*)(int, sockaddr*, socklen_t*);

Endpoint endpoint(int descriptor, GetName name) {
    sockaddr_storage storage = {};
    socklen_t size = sizeof storage;
    if (name(descriptor, reinterpret_cast<sockaddr*>(&storage), &size) != 0) {
        return {};
    }
    char text[INET6_ADDRSTRLEN] = {};
    if (storage.ss_family == AF_INET) {
        sockaddr_in address = {};
        std::memcpy(&address, &storage, sizeof address);
        inet_ntop(AF_INET, &address.sin_addr, text, sizeof text);
        return {text, ntohs(address.sin_port)};
    }
    if (storage.ss_family == AF_INET6) {
        sockaddr_in6 address = {};
        std::memcpy(&address, &storage, sizeof address);
        inet_ntop(AF_INET6, &address.sin6_addr, text, sizeof text);
        return {text, ntohs(address.sin6_port)};
    }
    return {};
}

// Every connected socket of this process with that port on our side. Stops where `use` returns true.
void each_connection(int local_port, const std::function<bool(int, const Endpoint&)>& use) {
    std::error_code failed;
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd", failed)) {
        const std::string name = entry.path().filename().string();
        int descriptor = -1;
        std::from_chars(name.data(), name.data() + name.size(), descriptor);
        if (descriptor < 0 || endpoint(descriptor, &getsockname).port != local_port) {
            continue;
        }
        const Endpoint remote = endpoint(descriptor, &getpeername);
        if (remote.port >= 0 && use(descriptor, remote)) {
            return;
        }
    }
}

} // namespace

int find_connection(int local_port, const std::string& remote_address, int remote_port) {
    int found = -1;
    each_connection(local_port, [&](int descriptor, const Endpoint& remote) {
        if (remote.port == remote_port && remote.address == remote_address) {
            found = descriptor;
        }
        return found >= 0;
    });
    return found;
}

bool peer_gone(int descriptor) {
    pollfd poll_one = {descriptor, POLLRDHUP, 0};
    return ::poll(&poll_one, 1, 0) > 0 && (poll_one.revents & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL)) != 0;
}

void end_connections(int local_port) {
    each_connection(local_port, [](int descriptor, const Endpoint&) {
        ::shutdown(descriptor, SHUT_RDWR);
        return false;
    });
}

} // namespace turboquant::serve
