#include "start.h"

#include "terminal.h"

#include "llm/error.h"

#include <filesystem>

namespace turboquant::app {

std::unique_ptr<Engine> start(const ModelFlags& flags, const llm::KvChoice& kv) {
    const std::string path = llm::resolve_model_path(flags.model);
    llm::SessionOptions options;
    options.kv = kv;
    options.threads = flags.threads;
    options.interrupt = &interrupt_flag();
    {
        const llm::ModelPlan plan(path);
        options.plan = plan.plan(llm::choose_context(plan, flags.context));
        llm::check_fit(plan, options.plan, kv);
    }
    const std::string name = std::filesystem::path(path).filename().string();
    auto engine = std::make_unique<Engine>(
        Engine{kv, llm::Model::load(path, kv.turboquant(), progress("loading " + name)), nullptr});
    engine->session = std::make_unique<llm::Session>(engine->model, options);
    return engine;
}

} // namespace turboquant::app
