// The HTTP side: routes, who may ask, limits, and the state of the server (loading, ready, shutting down).
#pragma once

#include "serve/http/metrics.h"
#include "serve/http/request_log.h"
#include "serve/http/service.h"

#include <memory>
#include <string>
#include <vector>

namespace turboquant::serve {

struct ServerOptions {
    std::string host = "127.0.0.1";
    int port = 8080;               // 0: any free one
    std::vector<std::string> keys; // none: everybody may ask
    std::string cors_origin;       // empty: off; "*": all
    size_t body_limit = 8u << 20;  // bytes
    int threads = 64;              // connections that are answered at once
};

class Server {
public:
    Server(ServerOptions options, Metrics& metrics, RequestLog& log);
    ~Server();
    Server(const Server&) = delete;
    Server& operator=(const Server&) = delete;

    // Takes the port and begins to answer: /health and all others with 503. Error in one line when it cannot.
    void start();
    int port() const;
    std::string url() const;

    // The model is there. The service must outlive the server.
    void ready(const Service& service);
    // Answers what is being answered, ends all connections and frees the port. The engine must have ended its requests.
    void stop();

private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

} // namespace turboquant::serve
