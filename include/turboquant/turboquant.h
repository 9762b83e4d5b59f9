/* The C interface of libturboquant: compressed stores of keys or values, and attention over them. Plain C99.
 *
 * A store holds one layer's keys or values of one stream for all KV heads. Every row has codes; up to `window` latest
 * rows and up to `sink_slots` pinned ones are kept exact (fp16) besides. What each call does in detail is documented
 * at its C++ twin in turboquant/store.h and turboquant/attention.h.
 *
 * Functions that can fail return a tq_status; tq_last_error() then says in one sentence what and where. Structs are
 * filled by the caller: zero everything, set struct_size to sizeof, then set what is needed. Zero means "none" or the
 * default for every field. Pointers are borrowed for the call.
 *
 * Threads: calls on different stores are independent. On one store tq_attend, tq_store_read and tq_store_size may run
 * at the same time as each other, everything else needs the store to itself. A workspace or batch serves one call at a
 * time. */
#ifndef TURBOQUANT_H
#define TURBOQUANT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* NOLINTBEGIN(readability-identifier-naming): C names */
typedef enum tq_status {
    TQ_OK = 0,
    TQ_INVALID_ARGUMENT = 1,
    TQ_OUT_OF_MEMORY = 2,
    TQ_UNSUPPORTED = 3,
    TQ_INTERNAL = 4
} tq_status;

enum { TQ_KEY = 0, TQ_VALUE = 1 }; /* what a store holds */
/* NOLINTEND(readability-identifier-naming) */

typedef struct tq_store tq_store;
typedef struct tq_workspace tq_workspace; /* memory that attention works in, reused between calls */
typedef struct tq_batch tq_batch;         /* the exact rows of the latest batch of writes (Staging in store.h) */

/* "major.minor.patch" */
const char* tq_version(void);

/* Why the last call of this thread failed; "" if none has. Valid until this thread's next failing call. */
const char* tq_last_error(void);

/* ---- stores ---------------------------------------------------------------------------------------------------- */

/* Two channels of a head that RoPE turns together, by theta radians a position. */
typedef struct tq_rope_pair {
    uint16_t first;
    uint16_t second;
    float theta;
} tq_rope_pair;

typedef struct tq_store_options {
    size_t struct_size;
    int32_t side;      /* TQ_KEY or TQ_VALUE */
    int32_t head_size; /* 4..1024, a multiple of 4 */
    int32_t kv_heads;
    int64_t rows;        /* capacity */
    int32_t bits;        /* 2, 3, 4, 5, 6, 8; 16 or 32: rows kept in fp16 or fp32. 0: 4 */
    int32_t window;      /* latest rows kept exact */
    int32_t sink_slots;  /* rows that may be pinned exact */
    const float* mu;     /* [kv_heads][head_size] or null: codes are those of R(lambda * (x - mu)) */
    const float* lambda; /* likewise; positive */
    /* Keys only: with pairs, mu is the mean before RoPE, turned for each row to its block of 256 positions. */
    const tq_rope_pair* rope;
    int32_t n_rope; /* pairs of a head, the same for all heads */
} tq_store_options;

/* Bytes that such a store takes at most, known from the options alone. */
tq_status tq_store_bytes(const tq_store_options* options, size_t* bytes);

/* *store is the caller's, to be given to tq_store_destroy; null on failure. */
tq_status tq_store_create(const tq_store_options* options, tq_store** store);
void tq_store_destroy(tq_store* store); /* null: nothing */

size_t tq_store_size(const tq_store* store); /* bytes, as tq_store_bytes says */

/* Row i is x + i*stride (floats, [kv_heads][head_size]) and goes to rows[i]. On failure nothing is written. batch may
 * be null; with one, a prompt's queries each see their own latest rows exact (tq_attention.key_batch). */
tq_status tq_store_write(tq_store* store, const float* x, int64_t stride, const int64_t* rows, int64_t n_rows,
                         tq_batch* batch);

/* The same; positions[i] is row i's place in its sequence (null: rows[i]), for stores with `rope`. */
tq_status tq_store_write_at(tq_store* store, const float* x, int64_t stride, const int64_t* rows,
                            const int32_t* positions, int64_t n_rows, tq_batch* batch);

/* Keeps a row exact until it is overwritten. It must be exact now, or in `batch` (may be null). */
tq_status tq_store_pin(tq_store* store, int64_t row, const tq_batch* batch);

/* The row as attention sees it, [kv_heads][head_size] floats. */
tq_status tq_store_read(const tq_store* store, int64_t row, float* x);

tq_status tq_store_clear(tq_store* store);

tq_status tq_batch_create(tq_batch** batch);
void tq_batch_destroy(tq_batch* batch); /* null: nothing */

/* ---- attention ------------------------------------------------------------------------------------------------- */

/* The caller's threads. run(context, n_tasks, task, arg) calls task(arg, i, worker) once for each i in [0, n_tasks) and
 * returns when all are done; worker is in [0, n_workers) and no two tasks at work share one. run null: no threads. */
typedef struct tq_parallel {
    void (*run)(void* context, int64_t n_tasks, void (*task)(void* arg, int64_t index, int worker), void* arg);
    void* context;
    int32_t n_workers;
} tq_parallel;

/* An OpenMP runtime that is in the process already (PyTorch's, say): its GOMP_parallel, which GNU's, LLVM's and Intel's
 * runtimes export, and how many of its threads to use. */
typedef struct tq_openmp {
    void (*parallel)(void (*body)(void*), void* data, unsigned n_threads, unsigned flags);
    int32_t n_threads;
} tq_openmp;

/* *parallel lends those threads. *openmp stays the caller's and must outlive *parallel. */
tq_status tq_openmp_threads(const tq_openmp* openmp, tq_parallel* parallel);

/* out = softmax(scale * q K^T + mask) V. Strides count elements. */
typedef struct tq_attention {
    size_t struct_size;
    const float* q; /* (query i, head h, channel c) at q[i*q_query_stride + h*q_head_stride + c] */
    int64_t q_query_stride;
    int64_t q_head_stride;
    int64_t n_queries;
    int32_t n_heads;      /* a multiple of kv_heads */
    int64_t n_rows;       /* rows [0, n_rows) are attended to */
    const uint16_t* mask; /* fp16 or null; (query i, row r) at mask[i*mask_query_stride + r]; -inf hides */
    int64_t mask_query_stride;
    float scale;              /* not defaulted: 0 makes all rows equal */
    float softcap;            /* > 0: score = softcap * tanh(score / softcap), before the mask */
    float max_bias;           /* > 0: ALiBi */
    const float* sink_logits; /* [n_heads] or null */
    float* out;               /* (query i, head h, channel c) at out[i*out_query_stride + h*out_head_stride + c] */
    int64_t out_query_stride;
    int64_t out_head_stride;
    const tq_batch* key_batch; /* the writes that these queries' rows came with, or null */
    const tq_batch* value_batch;
    int64_t batch_offset; /* query i's own row is the batch's row batch_offset + i */
    int32_t value_size;   /* MLA: values are the first channels of the keys (pass the key store twice). 0: none */
    tq_parallel parallel;
} tq_attention;

tq_status tq_workspace_create(tq_workspace** workspace);
void tq_workspace_destroy(tq_workspace* workspace); /* null: nothing */

/* A query that sees no row gets zeros. Uses the best instruction set here, or what TURBOQUANT_ISA names. */
tq_status tq_attend(const tq_store* keys, const tq_store* values, const tq_attention* call, tq_workspace* workspace);

#ifdef __cplusplus
}
#endif

#endif
