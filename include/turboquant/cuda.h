/* TurboQuant on NVIDIA GPUs: a paged compressed cache and attention over it. Plain C99, no CUDA headers needed. Built
 * into libturboquant_cuda where nvcc is found (docs/cuda.md).
 *
 * The codes and scales are those of the CPU store, bit for bit (docs/format.md); only where they lie in memory differs
 * (src/cuda/gpu_layout.h). All pointers named "device" are device memory of the current device, borrowed until the
 * stream has passed the call. `stream` is a cudaStream_t. No call allocates, synchronises or reads device memory on
 * the host, and the launch's shape depends on the host-side fields alone: every call can be captured in a CUDA graph.
 *
 * Functions return a tq_status; tq_cuda_last_error() then says in one sentence what and where. Structs: zero
 * everything, set struct_size to sizeof, then set what is needed. Threads: calls are independent of each other; calls
 * that write the same pages, or share a workspace, need an order between them (one stream is enough). */
#ifndef TURBOQUANT_CUDA_H
#define TURBOQUANT_CUDA_H

#include "turboquant/turboquant.h"

#ifdef __cplusplus
extern "C" {
#endif

/* NOLINTBEGIN(readability-identifier-naming): C names */
/* Element types of rows, queries and outputs. */
typedef enum tq_cuda_type { TQ_CUDA_F32 = 0, TQ_CUDA_F16 = 1, TQ_CUDA_BF16 = 2 } tq_cuda_type;
/* NOLINTEND(readability-identifier-naming) */

/* Why the last call of this thread failed; "" if none has. */
const char* tq_cuda_last_error(void);

/* ---- the paged cache ------------------------------------------------------------------------------------------- */

/* One layer's cache: n_pages pages of page_size tokens for all KV heads, tq_cuda_page_bytes() each, one after the
 * other, 16-byte aligned. Slot s is token s % page_size of page s / page_size. */
typedef struct tq_cuda_cache {
    size_t struct_size;
    void* pages; /* device */
    int64_t n_pages;
    int32_t page_size; /* 16, 32, 64, 128 or 256 tokens */
    int32_t kv_heads;
    int32_t head_size;  /* 64, 128 or 256 */
    int32_t key_bits;   /* 2, 3, 4 or 8 */
    int32_t value_bits; /* 2, 3, 4 or 8 */
    /* Conditioning of the keys, device, [kv_heads][head_size] fp32 each or null: codes are those of
     * R(lambda * (k - mu)), queries ask with R(q / lambda), and scores get q.mu back. Used as they are: the CPU store rounds
     * its own to fp16 first, so only such values give the same codes. */
    const float* mu;
    const float* lambda;
    /* > 0: mu has so many means, [mu_blocks][kv_heads][head_size]: position p's is that of block p / 256 (of the last for
     * later positions), as the means of keys that RoPE turns (turboquant::block_mean). 0: one mean for all. */
    int32_t mu_blocks;
    /* Rows kept exact (fp16, in the rotated basis) besides their codes, device, or null:
     * [sequence slot][sinks + ring][kv_heads][head_size] for keys, and the same for values. Position p of a sequence
     * lies in entry p if p < sinks, else sinks + (p - sinks) % ring. */
    void* exact_keys;
    void* exact_values;
    int32_t sinks;  /* first positions kept exact; 0 without exact rows */
    int32_t ring;   /* entries of the ring: at least window + the longest q_len - 1; 0 without exact rows */
    int32_t window; /* latest positions, up to and with the query's own, that are attended to exactly */
} tq_cuda_cache;

/* Bytes of one page, 0 if the shape cannot be served. Reads page_size, kv_heads, head_size and the bits only. */
size_t tq_cuda_page_bytes(const tq_cuda_cache* cache);

/* Quantise on write: n rows of keys and values, (row i, head h, channel c) at x[i*stride + h*head_stride + c], into the
 * slots given. Rows are rounded to fp16 first, as on the CPU; a row with NaN or infinity in a head is stored as zeros.
 * A slot must not appear twice in a call. Runs of 16 rows that start at a multiple of 16 of the input and fill 16
 * aligned slots in order are written fastest. */
typedef struct tq_cuda_write {
    size_t struct_size;
    const void* keys;   /* device */
    const void* values; /* device */
    int32_t type;       /* tq_cuda_type */
    int64_t key_stride; /* in elements, as all strides here */
    int64_t key_head_stride;
    int64_t value_stride;
    int64_t value_head_stride;
    int64_t n;
    const int64_t* slots;      /* device, [n]; negative: the row is left out */
    const int64_t* exact_rows; /* device, [n], or null: sequence slot * (sinks + ring) + entry; negative: none */
    const int64_t* positions;  /* device, [n], of each row in its sequence; not read without mu_blocks */
} tq_cuda_write;
tq_status tq_cuda_encode(const tq_cuda_cache* cache, const tq_cuda_write* write, void* stream);

/* Reads rows back, for tests and for saving. Slot i of n (negative: zeros):
 * codes:  [2: keys, values][n][kv_heads][head_size] bytes, each the stored code (layout.h), and
 * scales: [2][n][kv_heads] fp16; both device, either may be null.
 * rows:   [2][n][kv_heads][head_size] of `type`, decoded; null if not wanted. rotated != 0: in the rotated basis,
 *         conditioning not undone.
 * positions: device, [n]: as they were written; needed for plain rows of a cache with mu_blocks, else null or not read. */
tq_status tq_cuda_read(const tq_cuda_cache* cache, const int64_t* slots, const int64_t* positions, int64_t n,
                       void* codes, void* scales, void* rows, int32_t type, int32_t rotated, void* stream);

/* ---- attention ------------------------------------------------------------------------------------------------- */

/* out = softmax(scale * q K^T + mask) V for q_len queries of every sequence of a batch, over codes as they are. */
typedef struct tq_cuda_attention {
    size_t struct_size;
    const void* q; /* device; (sequence b, query i, head h, channel c) at q[b*q_batch + i*q_query + h*q_head + c] */
    void* out;     /* device, likewise */
    int32_t type;  /* tq_cuda_type of q and out */
    int64_t q_batch, q_query, q_head;
    int64_t out_batch, out_query, out_head;
    int32_t batch;
    int32_t q_len; /* 1..16; tq_cuda_prefill: any positive number */
    int32_t heads; /* a multiple of kv_heads, at most 16 times as many */
    /* Device. Token t of sequence b is token t % page_size of page page_table[b*page_table_stride + t / page_size]. */
    const int32_t* page_table;
    int64_t page_table_stride;
    const int32_t* lengths;        /* device, [batch]: tokens of each sequence, its queries' own included; >= 0 */
    const int32_t* sequence_slots; /* device, [batch], where the cache has exact rows: whose exact rows they are */
    float scale;                   /* 0: 1/sqrt(head_size) */
    float softcap;                 /* > 0: score = softcap * tanh(score / softcap) */
    int32_t not_causal;            /* 0: query i sees tokens 0 .. length - q_len + i. 1: every query sees all */
    int32_t sliding_window;        /* > 0: only the latest so many tokens up to the query's own */
    const float* sink_logits;      /* device, [heads], or null: one more logit that takes probability, gives nothing */
    void*
        workspace; /* device, 256-byte aligned. tq_cuda_attend: zeroed once before its first use, kept by later calls */
    size_t workspace_size;
    int32_t
        n_blocks; /* thread blocks; 0: what fills the current device. Fix it for a captured plan on another device */
    int32_t max_length; /* tq_cuda_prefill only: no sequence is longer. Sizes its workspace and launch */
} tq_cuda_attention;

/* Bytes of workspace that an attention of this shape needs on the current device. Reads no pointers. */
tq_status tq_cuda_workspace_bytes(const tq_cuda_cache* cache, const tq_cuda_attention* attention, size_t* bytes);

/* Error against exact attention over the decoded rows: below 1e-3 of the output's norm (queries and probabilities have
 * 16 bits, sums are fp32; tested at 3e-4 for fp32 in- and output). A query that sees no token gets zeros. */
tq_status tq_cuda_attend(const tq_cuda_cache* cache, const tq_cuda_attention* attention, void* stream);

/* The same attention for many queries of every sequence (prefill). Codes and exact rows become fp16 tiles in the
 * workspace once, a flash loop runs over those on the tensor cores. The workspace needs no zeroing and keeps nothing
 * between calls: `all` bytes serve every sequence and KV head in one pass, fewer (at least `least`) in several, one
 * after the other. Reads no pointers.
 *
 * A query sees a token exactly if it is a sink, or among the latest `window` up to the query and among the latest
 * `ring` of the sequence, which may be fewer than the window before the earliest queries: those see codes.
 * Where rows are few their tokens are split between blocks, for n_blocks blocks in all (0: as many as the current device
 * has SMs); the workspace depends on it. scale must not be negative. */
tq_status tq_cuda_prefill_workspace_bytes(const tq_cuda_cache* cache, const tq_cuda_attention* attention, size_t* least,
                                          size_t* all);

/* Error against exact attention over the decoded rows: 6e-4 of the output's norm, 1.5e-3 where scores are large (operands
 * are rounded to fp16, sums are fp32; tested). A query that sees no token gets zeros; a sequence longer than max_length gets NaN. */
tq_status tq_cuda_prefill(const tq_cuda_cache* cache, const tq_cuda_attention* attention, void* stream);

#ifdef __cplusplus
}
#endif
#endif
