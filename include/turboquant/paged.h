/* A paged compressed cache in host memory, and attention over it: one layer's keys and values of many sequences, whose
 * tokens lie in pages that the caller hands out. Plain C99, part of libturboquant; what turboquant/cuda.h does on a GPU,
 * with the same codes and scales bit for bit. Rows, queries and outputs are fp32.
 *
 * Slot s is token s % page_size of page s / page_size. A page is whole tiles of 64 tokens (docs/format.md); memory is
 * reserved, not touched: pages that nothing was written to cost nothing.
 *
 * Conventions (structs, errors, threads, borrowed pointers): turboquant/turboquant.h. On one cache, calls of
 * tq_paged_read and tq_paged_attend may run at the same time as each other; tq_paged_write needs it to itself. */
#ifndef TURBOQUANT_PAGED_H
#define TURBOQUANT_PAGED_H

#include "turboquant/turboquant.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tq_paged tq_paged;

typedef struct tq_paged_options {
    size_t struct_size;
    int64_t n_pages;
    int32_t page_size; /* tokens; a multiple of 64 */
    int32_t kv_heads;
    int32_t head_size;   /* 4..1024, a multiple of 4 */
    int32_t key_bits;    /* 2, 3, 4, 5, 6 or 8 */
    int32_t value_bits;  /* likewise */
    const float* mu;     /* [kv_heads][head_size] or null: codes of keys are those of R(lambda * (k - mu)); copied */
    const float* lambda; /* likewise; positive */
    /* Rows kept exact (fp16) besides their codes: `sequences` slots of sinks + ring entries. Position p of a sequence
     * belongs in entry p if p < sinks, else in entry sinks + (p - sinks) % ring. */
    int32_t sequences; /* 0 without exact rows */
    int32_t sinks;     /* first positions of a sequence that are attended to exactly */
    int32_t window;    /* latest positions, up to and with the query's own, that are attended to exactly */
    int32_t ring;      /* with a window: at least window + the longest q_len - 1 */
} tq_paged_options;

/* Bytes of one page's codes and scales, known from the options alone; 0 if they cannot be served, and tq_last_error()
 * says why. */
size_t tq_paged_page_bytes(const tq_paged_options* options);

/* *cache is the caller's, to be given to tq_paged_destroy; null on failure. */
tq_status tq_paged_create(const tq_paged_options* options, tq_paged** cache);
void tq_paged_destroy(tq_paged* cache); /* null: nothing */

/* Scales of a row and head: 1 for head sizes 4, 12 and 20 times a power of two, more for others; 0 for null. */
int32_t tq_paged_blocks(const tq_paged* cache);

/* Quantises n rows of keys and values; row i is [kv_heads][head_size] floats at keys + i*key_stride. Rows are rounded to
 * fp16 first; a row with NaN or infinity in a head is stored as zeros there. On failure nothing is written, unless a
 * slot comes twice (it must not). */
typedef struct tq_paged_rows {
    size_t struct_size;
    const float* keys;
    const float* values;
    int64_t key_stride; /* in elements, as all strides here */
    int64_t value_stride;
    int64_t n;
    const int64_t* slots;      /* [n]; negative: the row is left out */
    const int64_t* exact_rows; /* [n], or null: sequence slot * (sinks + ring) + entry; negative: none */
    tq_parallel parallel;
} tq_paged_rows;
tq_status tq_paged_write(tq_paged* cache, const tq_paged_rows* rows);

/* Reads rows back as their codes have them. Slot i of n (negative: zeros); each output may be null:
 * codes:  [2: keys, values][n][kv_heads][head_size] bytes, the stored codes (layout.h)
 * scales: [2][n][kv_heads][tq_paged_blocks()] fp16
 * rows:   [2][n][kv_heads][head_size] floats, decoded. rotated != 0: in the rotated basis, conditioning not undone.
 * parallel: null for none. */
tq_status tq_paged_read(const tq_paged* cache, const int64_t* slots, int64_t n, uint8_t* codes, uint16_t* scales,
                        float* rows, int32_t rotated, const tq_parallel* parallel);

/* out = softmax(scale * q K^T + mask) V for q_len queries of every sequence of a batch, over codes as they are. */
typedef struct tq_paged_attention {
    size_t struct_size;
    const float* q; /* (sequence b, query i, head h, channel c) at q[b*q_batch + i*q_query + h*q_head + c] */
    float* out;     /* likewise */
    int64_t q_batch, q_query, q_head;
    int64_t out_batch, out_query, out_head;
    int32_t batch;
    int32_t q_len; /* 1 for decoding; any number for a prompt */
    int32_t heads; /* a multiple of kv_heads */
    /* Token t of sequence b is token t % page_size of page page_table[b*page_table_stride + t / page_size]. */
    const int32_t* page_table;
    int64_t page_table_stride;
    int32_t table_pages;           /* entries of a row of page_table: a longer sequence is refused */
    const int32_t* lengths;        /* [batch]: tokens of each sequence, its queries' own included; >= 0 */
    const int32_t* sequence_slots; /* [batch], where the cache has exact rows: whose exact rows they are */
    float scale;                   /* 0: 1/sqrt(head_size) */
    float softcap;                 /* > 0: score = softcap * tanh(score / softcap) */
    int32_t not_causal;            /* 0: query i sees tokens 0 .. length - q_len + i. 1: every query sees all */
    int32_t sliding_window;        /* > 0: only the latest so many tokens up to the query's own */
    const float* sink_logits;      /* [heads] or null: one more logit that takes probability, gives nothing */
    /* 0: a ring that is too short for the window of the earliest query is refused. 1: what of a query's window the ring
     * no longer holds (it has the sequence's latest `ring` positions) counts by its codes. */
    int32_t prefill;
    tq_parallel parallel;
} tq_paged_attention;

/* Error against exact attention over the decoded rows: that of tq_attend (turboquant/attention.h). A query that sees no
 * token gets zeros. A sequence that an earlier one of the batch failed before it has no output. */
tq_status tq_paged_attend(const tq_paged* cache, const tq_paged_attention* attention, tq_workspace* workspace);

#ifdef __cplusplus
}
#endif

#endif
