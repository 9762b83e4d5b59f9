// The threads of an OpenMP runtime that the caller's process has anyway, so that two pools do not fight over the cores.
#include "capi/guard.h"

#include <atomic>

namespace {

using namespace turboquant::capi;

struct Region {
    void (*task)(void* arg, int64_t index, int worker);
    void* arg;
    int64_t n_tasks;
    std::atomic<int64_t> next{0};
    std::atomic<int> workers{0};
};

// One thread's part. Fewer threads than asked for may come: whoever is there takes the next task.
void work(void* data) {
    Region& region = *static_cast<Region*>(data);
    const int worker = region.workers.fetch_add(1, std::memory_order_relaxed);
    for (int64_t i = 0; (i = region.next.fetch_add(1, std::memory_order_relaxed)) < region.n_tasks;) {
        region.task(region.arg, i, worker);
    }
}

void run(void* context, int64_t n_tasks, void (*task)(void* arg, int64_t index, int worker), void* arg) {
    const auto& openmp = *static_cast<const tq_openmp*>(context);
    Region region{task, arg, n_tasks};
    openmp.parallel(work, &region, static_cast<unsigned>(openmp.n_threads), 0);
}

} // namespace

tq_status tq_openmp_threads(const tq_openmp* openmp, tq_parallel* parallel) {
    return guarded([&]() -> turboquant::Status {
        if (openmp == nullptr || parallel == nullptr || openmp->parallel == nullptr) {
            return null_argument("tq_openmp_threads", openmp == nullptr     ? "openmp"
                                                      : parallel == nullptr ? "parallel"
                                                                            : "openmp->parallel");
        }
        if (openmp->n_threads < 1) {
            return turboquant::invalid("tq_openmp_threads: n_threads " + std::to_string(openmp->n_threads) +
                                       "; pass at least 1");
        }
        // The context is handed back as it came: run() only reads it.
        *parallel = {run, const_cast<tq_openmp*>(openmp), openmp->n_threads};
        return {};
    });
}
