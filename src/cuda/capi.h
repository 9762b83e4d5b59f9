// What the files of the C interface share: refusals in words, and checks of the structs. Internal.
#pragma once

#include "cuda/gpu_layout.h"
#include "turboquant/cuda.h"

#include <cuda_runtime.h>

#include <string>

namespace turboquant::cuda {

const std::string& error_of_this_thread();
// Keep a message for tq_cuda_last_error and give the status.
tq_status fail(tq_status status, std::string message);
tq_status invalid(const char* call, const std::string& what);
tq_status cuda_status(const char* call, cudaError_t error);

// Each gives "" or what is wrong: with a cache's shape; with a cache that a kernel will read; with an attention's heads
// and batch; with the rest of it.
std::string shape_problem(const tq_cuda_cache& c);
std::string cache_problem(const tq_cuda_cache* cache);
std::string heads_problem(const tq_cuda_cache& c, const tq_cuda_attention& a);
std::string attention_problem(const tq_cuda_cache& c, const tq_cuda_attention& a);

// The arguments of launch_offsets for all items of an attention; `offsets` is where they go.
struct OffsetArgs;
OffsetArgs offset_args(const tq_cuda_cache& c, const tq_cuda_attention& a, void* offsets, float scale_log2);

int cache_tile_bytes(const tq_cuda_cache& c);
int page_shift(const tq_cuda_cache& c); // page_size = 1 << it
bool type_ok(int32_t type);
// Bit c % 32 of word c / 32: the rotation negates channel c. `signs` must be zero.
void rotation_signs(int head_size, uint32_t (&signs)[8]);
// All of `args`, from a cache and an attention without problems.
struct CallArgs;
void fill_call_args(const tq_cuda_cache& c, const tq_cuda_attention& a, CallArgs& args);

} // namespace turboquant::cuda
