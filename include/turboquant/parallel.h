// How the core uses its caller's threads. The core owns no threads: a host that has a pool lends it for the length
// of one call, so that two pools never spin against each other.
#pragma once

#include <cstdint>
#include <type_traits>

namespace turboquant {

// Non-owning, never allocates. `run(context, n_tasks, task, arg)` must call task(arg, i, worker) exactly once for each
// i in [0, n_tasks) and return when all are done; `worker` is in [0, n_workers) and no two tasks running at the same
// time share one.
struct ParallelFor {
    using Task = void (*)(void* arg, int64_t index, int worker);

    void (*run)(void* context, int64_t n_tasks, Task task, void* arg) = nullptr; // null: run in the caller's thread
    void* context = nullptr;
    int n_workers = 1;

    // body: callable as body(int64_t index, int worker). It must not throw.
    template <class Body>
    void operator()(int64_t n_tasks, Body&& body) const {
        auto call = [](void* arg, int64_t index, int worker) {
            (*static_cast<std::remove_reference_t<Body>*>(arg))(index, worker);
        };
        if (run == nullptr || n_workers <= 1 || n_tasks <= 1) {
            for (int64_t i = 0; i < n_tasks; ++i) {
                body(i, 0);
            }
        } else {
            run(context, n_tasks, +call, const_cast<void*>(static_cast<const void*>(&body)));
        }
    }
};

} // namespace turboquant
