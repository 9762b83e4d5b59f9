#include "capi/guard.h"

namespace turboquant::capi {
namespace {

// A fixed buffer: telling of a failure must not fail for lack of memory.
thread_local char message_of_thread[512] = "";

} // namespace

const char* last_error() noexcept {
    return message_of_thread;
}

tq_status failed(tq_status code, const char* message) noexcept {
    std::strncpy(message_of_thread, message, sizeof message_of_thread - 1);
    return code;
}

tq_status report(const Status& s) noexcept {
    switch (s.code()) {
    case StatusCode::ok: return TQ_OK;
    case StatusCode::invalid_argument: return failed(TQ_INVALID_ARGUMENT, s.message().c_str());
    case StatusCode::out_of_memory: return failed(TQ_OUT_OF_MEMORY, s.message().c_str());
    case StatusCode::unsupported: return failed(TQ_UNSUPPORTED, s.message().c_str());
    case StatusCode::internal: break;
    }
    return failed(TQ_INTERNAL, s.message().c_str());
}

} // namespace turboquant::capi
