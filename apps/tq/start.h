// From flags to a model and a session: the memory plan, the check that it fits, loading, the context.
#pragma once

#include "options.h"

#include "llm/session.h"

#include <memory>

namespace turboquant::app {

struct Engine {
    llm::KvChoice kv;
    llm::Model model;
    std::unique_ptr<llm::Session> session;
};

// Progress goes to stderr. The Engine must not move while the session lives: hence the pointer.
std::unique_ptr<Engine> start(const ModelFlags& flags, const llm::KvChoice& kv);

} // namespace turboquant::app
