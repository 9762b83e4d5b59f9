// A server that a benchmark starts and ends: tq serve of this very program, or a stock llama-server.
#pragma once

#include "bench_client.h"

#include <cstdint>
#include <string>
#include <vector>

#include <sys/types.h>

namespace turboquant::app {

struct ServerSpec {
    std::string engine; // "tq serve", "llama-server", or "" for one that runs already
    std::string program;
    std::string model;
    std::string kv = "tq4"; // for llama-server: a type of its own, else the plug-in
    int64_t slots = 1;
    int64_t slot_context = 4096; // tokens that each slot must hold
    int threads = 0;             // 0: the server's choice
};

class ServerProcess {
public:
    // Starts it on a free port of the loopback and waits until it is ready. Error, with the log's reason, when it ends before that.
    explicit ServerProcess(ServerSpec spec);
    // One that runs already, and goes on.
    explicit ServerProcess(const Endpoint& endpoint);
    // Asks it to end, and makes it.
    ~ServerProcess();
    ServerProcess(const ServerProcess&) = delete;
    ServerProcess& operator=(const ServerProcess&) = delete;

    const ServerSpec& spec() const { return spec_; }
    const Endpoint& endpoint() const { return endpoint_; }
    // As allocated for all slots together, by what the server says (GET /props, or its log); 0: it does not.
    int64_t kv_bytes() const;

private:
    void stop();
    std::string log() const;
    std::string last_words() const;

    ServerSpec spec_;
    Endpoint endpoint_;
    pid_t process_ = -1;
    std::string log_path_;
};

} // namespace turboquant::app
