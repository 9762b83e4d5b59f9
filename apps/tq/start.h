// From flags to a model and a session: the memory plan, the check that it fits, loading, the context.
#pragma once

#include "options.h"

#include "llm/session.h"
#include "llm/tuning.h"

#include <memory>

namespace turboquant::app {

struct Engine {
    llm::KvChoice kv; // with its profile
    llm::Model model;
    std::unique_ptr<llm::TemporaryProfile> profile; // where the cache folder has no place for one
    std::unique_ptr<llm::Session> session;
};

// Looks for the model's profile and makes one where there is none. Progress goes to stderr. The Engine must not move while the session lives: hence the pointer.
std::unique_ptr<Engine> start(const ModelFlags& flags, const llm::KvChoice& kv);

} // namespace turboquant::app
