// Counters and histograms in Prometheus' text format.
#pragma once

#include "serve/engine/engine.h"

#include <memory>
#include <string>

namespace turboquant::serve {

class Metrics final : public Observer {
public:
    Metrics();
    ~Metrics() override;

    void prompt_placed(int64_t tokens, int64_t cached) override;
    void first_token(double seconds) override;
    void next_token(double seconds) override;
    void answer_over(std::string_view outcome) override;
    // An HTTP request was answered. endpoint: one of the server's own paths, so that their number is bounded.
    void request(const std::string& endpoint, int status);

    // All of it, with the engine's gauges as they are now; null: still loading.
    std::string text(const EngineStatus* engine);

private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

} // namespace turboquant::serve
