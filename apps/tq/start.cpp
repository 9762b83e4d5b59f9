#include "start.h"

#include "terminal.h"

#include "llm/error.h"

#include <filesystem>

namespace turboquant::app {

std::unique_ptr<Engine> start(const ModelFlags& flags, const llm::KvChoice& kv) {
    const std::string path = llm::resolve_model_path(flags.model);
    const llm::ProfileFlags profile = choose_profile(flags.profile);
    const llm::ModelPlan plan(path);
    llm::SessionOptions options;
    options.kv = kv;
    options.threads = flags.threads;
    options.interrupt = &interrupt_flag();
    options.plan = plan.plan(llm::choose_context(plan, flags.context));
    llm::find_profile(path, profile, options.plan, options.kv, {}); // what is wrong shows before the model is loaded
    llm::check_fit(plan, options.plan, options.kv);
    const std::string name = std::filesystem::path(path).filename().string();
    auto engine = std::make_unique<Engine>(
        Engine{kv, llm::Model::load(path, kv.turboquant(), progress("loading " + name)), nullptr, nullptr});
    llm::TuneOptions tuning;
    tuning.hurry = true;
    tuning.threads = flags.threads;
    tuning.interrupt = &interrupt_flag();
    tuning.progress = progress("measuring the keys of " + name);
    engine->profile = llm::prepare_profile(engine->model, plan, profile, tuning, options.kv, print_note);
    engine->kv = options.kv;
    engine->session = std::make_unique<llm::Session>(engine->model, options);
    return engine;
}

} // namespace turboquant::app
