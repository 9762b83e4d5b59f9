// What every function of the C interface shares: messages and exceptions turned into codes. Internal.
#pragma once

#include "turboquant/attention.h"
#include "turboquant/status.h"
#include "turboquant/turboquant.h"

#include <cstddef>
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <vector>

struct tq_workspace {
    turboquant::AttentionWorkspace workspace;
    // Of the sequences of a paged cache (paged.cpp).
    std::vector<std::vector<int32_t>> tiles;
    std::vector<turboquant::RowRange> ranges; // [sequence][query]
    std::vector<std::vector<turboquant::GivenRow>> given;
    std::vector<turboquant::AttentionJob> jobs;
};

namespace turboquant::capi {

// This thread's last message.
const char* last_error() noexcept;
// Keeps the message, gives the code back.
tq_status failed(tq_status code, const char* message) noexcept;
tq_status report(const Status& s) noexcept;

// body() -> Status, with every exception turned into one.
template <class Body>
tq_status guarded(Body&& body) noexcept {
    try {
        return report(body());
    } catch (const std::bad_alloc&) {
        return failed(TQ_OUT_OF_MEMORY, "turboquant: out of memory");
    } catch (const std::exception& e) {
        return failed(TQ_INTERNAL, e.what());
    } catch (...) {
        return failed(TQ_INTERNAL, "turboquant: unknown exception");
    }
}

inline Status null_argument(const char* function, const char* argument) {
    return invalid(std::string(function) + ": " + argument + " is null");
}

// A caller's struct, which may be older (shorter) than ours: what it lacks is zero.
template <class T>
Status copy_struct(const T* in, const char* name, T& out) {
    if (in == nullptr) {
        return invalid(std::string(name) + ": null pointer");
    }
    if (in->struct_size < sizeof(size_t) || in->struct_size > sizeof(T)) {
        return invalid(std::string(name) + ": struct_size " + std::to_string(in->struct_size) +
                       " where this library has " + std::to_string(sizeof(T)) +
                       "; zero the struct and set struct_size to its sizeof");
    }
    out = {};
    std::memcpy(&out, in, in->struct_size);
    return {};
}

inline ParallelFor parallel_for(const tq_parallel& p) {
    return {p.run, p.context, p.n_workers > 1 ? p.n_workers : 1};
}

} // namespace turboquant::capi
