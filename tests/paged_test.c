/* The paged cache through the C interface: what pages hold and how they are attended to, beside stores whose rows lie in
 * order; refusals; threads of an OpenMP runtime. */
#include "turboquant/paged.h"

#include "capi_testing.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HEAD 64
#define KV_HEADS 2
#define HEADS 6
#define ELEMENTS (HEAD * KV_HEADS)
#define LENGTH 150 /* of sequence 0; sequence 1 has OTHER */
#define OTHER 70
#define PAGE 64
#define PAGES 8
#define TABLE 3

static tq_paged_options options(void) {
    tq_paged_options o;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    o.n_pages = PAGES;
    o.page_size = PAGE;
    o.kv_heads = KV_HEADS;
    o.head_size = HEAD;
    o.key_bits = 4;
    o.value_bits = 3;
    return o;
}

static float keys[LENGTH * ELEMENTS];
static float values[LENGTH * ELEMENTS];
static float q[2 * HEADS * HEAD];
static const int32_t kTable[2][TABLE] = {{6, 0, 3}, {2, 5, -7}}; /* the last entry is beyond its sequence */

static tq_store* plain_store(int32_t side, int32_t bits, const float* x, int64_t n, const float* mu) {
    tq_store_options o;
    tq_store* store = NULL;
    int64_t rows[LENGTH];
    int64_t i;
    memset(&o, 0, sizeof o);
    o.struct_size = sizeof o;
    o.side = side;
    o.head_size = HEAD;
    o.kv_heads = KV_HEADS;
    o.rows = LENGTH;
    o.bits = bits;
    o.mu = mu;
    for (i = 0; i < n; ++i) {
        rows[i] = i;
    }
    CHECK(tq_store_create(&o, &store) == TQ_OK);
    CHECK(tq_store_write(store, x, ELEMENTS, rows, n, NULL) == TQ_OK);
    return store;
}

/* Rows [0, n) of the sequence in row `b` of the table, the first `left_out` of them left out. */
static void write_rows(tq_paged* cache, int b, int64_t n, int64_t left_out) {
    tq_paged_rows r;
    int64_t slots[LENGTH];
    int64_t i;
    for (i = 0; i < n; ++i) {
        slots[i] = i < left_out ? -1 : (int64_t)kTable[b][i / PAGE] * PAGE + i % PAGE;
    }
    memset(&r, 0, sizeof r);
    r.struct_size = sizeof r;
    r.keys = keys;
    r.values = values;
    r.key_stride = ELEMENTS;
    r.value_stride = ELEMENTS;
    r.n = n;
    r.slots = slots;
    CHECK(tq_paged_write(cache, &r) == TQ_OK);
}

static tq_paged_attention attention(const int32_t* lengths, float* out) {
    tq_paged_attention a;
    memset(&a, 0, sizeof a);
    a.struct_size = sizeof a;
    a.q = q;
    a.out = out;
    a.q_batch = a.out_batch = HEADS * HEAD;
    a.q_query = a.out_query = HEADS * HEAD;
    a.q_head = a.out_head = HEAD;
    a.batch = 2;
    a.q_len = 1;
    a.heads = HEADS;
    a.page_table = kTable[0];
    a.page_table_stride = TABLE;
    a.table_pages = TABLE;
    a.lengths = lengths;
    return a;
}

static int threads_seen = 0;
typedef struct Part {
    void (*body)(void*);
    void* data;
} Part;
static void* part_main(void* p) {
    const Part* part = (const Part*)p;
    part->body(part->data);
    return NULL;
}
/* What GOMP_parallel does, with one thread more than the caller's. */
static void two_threads(void (*body)(void*), void* data, unsigned n_threads, unsigned flags) {
    pthread_t other;
    Part part;
    part.body = body;
    part.data = data;
    CHECK(n_threads == 2 && flags == 0);
    CHECK(pthread_create(&other, NULL, part_main, &part) == 0);
    body(data);
    CHECK(pthread_join(other, NULL) == 0);
    ++threads_seen;
}

static void test_pages(void) {
    const int32_t lengths[2] = {LENGTH, OTHER};
    tq_paged_options o = options();
    tq_paged* cache = NULL;
    tq_workspace* workspace = NULL;
    tq_paged_attention a;
    tq_attention plain;
    tq_openmp openmp = {two_threads, 2};
    tq_parallel parallel;
    float out[2 * HEADS * HEAD];
    float again[2 * HEADS * HEAD];
    float want[HEADS * HEAD];
    float mu[ELEMENTS];
    float row[ELEMENTS];
    float* read = malloc(sizeof *read * 2 * LENGTH * ELEMENTS);
    uint8_t* codes = malloc((size_t)2 * LENGTH * ELEMENTS);
    uint16_t* scales = malloc(sizeof *scales * 2 * LENGTH * KV_HEADS);
    int64_t slots[LENGTH];
    int64_t i;
    int b;
    for (i = 0; i < ELEMENTS; ++i) {
        mu[i] = noise();
    }
    for (i = 0; i < LENGTH * ELEMENTS; ++i) {
        keys[i] = noise() + mu[i % ELEMENTS];
        values[i] = noise();
    }
    for (i = 0; i < 2 * HEADS * HEAD; ++i) {
        q[i] = noise();
    }
    o.mu = mu;
    /* 4 + 3 bits of 64 values and two scales. */
    CHECK(tq_paged_page_bytes(&o) == (size_t)PAGE * KV_HEADS * (HEAD * 7 / 8 + 4));
    CHECK(tq_paged_create(&o, &cache) == TQ_OK);
    CHECK(tq_workspace_create(&workspace) == TQ_OK);
    write_rows(cache, 1, OTHER, 0);
    write_rows(cache, 0, LENGTH, 0);
    memset(&parallel, 0, sizeof parallel);
    CHECK(tq_openmp_threads(&openmp, &parallel) == TQ_OK);
    for (b = 0; b < 2; ++b) {
        tq_store* k = plain_store(TQ_KEY, 4, keys, lengths[b], mu);
        tq_store* v = plain_store(TQ_VALUE, 3, values, lengths[b], NULL);
        for (i = 0; i < lengths[b]; ++i) {
            slots[i] = (int64_t)kTable[b][i / PAGE] * PAGE + i % PAGE;
        }
        slots[5] = -1;
        CHECK(tq_paged_read(cache, slots, lengths[b], codes, scales, read, 0, b == 0 ? NULL : &parallel) == TQ_OK);
        for (i = 0; i < lengths[b]; ++i) {
            const float* const got = read + i * ELEMENTS;
            memset(row, 0, sizeof row);
            CHECK(i == 5 || tq_store_read(k, i, row) == TQ_OK);
            CHECK(memcmp(row, got, sizeof row) == 0);
            memset(row, 0, sizeof row);
            CHECK(i == 5 || tq_store_read(v, i, row) == TQ_OK);
            CHECK(memcmp(row, got + (int64_t)lengths[b] * ELEMENTS, sizeof row) == 0);
            CHECK((scales[i * KV_HEADS] == 0) == (i == 5));
            CHECK(codes[i * ELEMENTS] <= 15 && codes[(lengths[b] + i) * ELEMENTS] <= 7);
        }
        a = attention(lengths, out);
        if (b == 1) {
            a.parallel = parallel;
        }
        CHECK(tq_paged_attend(cache, &a, workspace) == TQ_OK);
        memset(&plain, 0, sizeof plain);
        plain.struct_size = sizeof plain;
        plain.q = q + b * HEADS * HEAD;
        plain.q_head_stride = HEAD;
        plain.n_queries = 1;
        plain.n_heads = HEADS;
        plain.n_rows = lengths[b];
        plain.scale = 1.0f / 8;
        plain.out = want;
        plain.out_head_stride = HEAD;
        plain.parallel = a.parallel;
        CHECK(tq_attend(k, v, &plain, workspace) == TQ_OK);
        CHECK(memcmp(want, out + b * HEADS * HEAD, sizeof want) == 0);
        tq_store_destroy(k);
        tq_store_destroy(v);
    }
    CHECK(threads_seen >= 3);

    /* Only the latest 9 tokens; the same as a sequence whose first tokens are hidden. */
    a = attention(lengths, again);
    a.sliding_window = 9;
    CHECK(tq_paged_attend(cache, &a, workspace) == TQ_OK);
    CHECK(memcmp(again, out, sizeof out) != 0);
    for (i = 0; i < OTHER; ++i) {
        slots[i] = (int64_t)kTable[1][i / PAGE] * PAGE + i % PAGE;
    }
    /* A row that is left out of a write keeps what it had. */
    for (i = 0; i < 50 * ELEMENTS; ++i) {
        keys[i] = 100;
    }
    write_rows(cache, 1, 60, 50);
    CHECK(tq_paged_attend(cache, &a, workspace) == TQ_OK);
    CHECK(memcmp(again, out, sizeof out) != 0);
    a = attention(lengths, again);
    CHECK(tq_paged_attend(cache, &a, workspace) == TQ_OK);
    CHECK(memcmp(again, out, sizeof out) == 0);
    write_rows(cache, 1, 60, 49);
    CHECK(tq_paged_attend(cache, &a, workspace) == TQ_OK);
    CHECK(memcmp(again, out, HEADS * HEAD * sizeof *out) == 0);
    CHECK(memcmp(again + HEADS * HEAD, out + HEADS * HEAD, HEADS * HEAD * sizeof *out) != 0);
    /* In the rotated basis a row has the same length. */
    CHECK(tq_paged_read(cache, slots, OTHER, NULL, NULL, read, 1, NULL) == TQ_OK);
    {
        double rotated = 0;
        double plainly = 0;
        for (i = 0; i < HEAD; ++i) {
            rotated += read[(OTHER + 20) * ELEMENTS + i] * read[(OTHER + 20) * ELEMENTS + i];
        }
        CHECK(tq_paged_read(cache, slots, OTHER, NULL, NULL, read, 0, NULL) == TQ_OK);
        for (i = 0; i < HEAD; ++i) {
            plainly += read[(OTHER + 20) * ELEMENTS + i] * read[(OTHER + 20) * ELEMENTS + i];
        }
        CHECK(fabs(rotated - plainly) < 1e-4 * plainly && plainly > 1);
    }
    tq_paged_destroy(cache);
    tq_workspace_destroy(workspace);
    free(read);
    free(codes);
    free(scales);
}

/* One value differs from all others by far, in a row of the window: with exact rows it comes out as it went in. */
static void test_exact_rows(void) {
    const int32_t lengths[2] = {LENGTH, OTHER};
    const int32_t sequence_slots[2] = {2, 0};
    tq_paged_options o = options();
    tq_paged* cache = NULL;
    tq_workspace* workspace = NULL;
    tq_paged_rows r;
    tq_paged_attention a;
    float out[2 * HEADS * HEAD];
    float few[2 * HEADS * HEAD];
    int64_t slots[LENGTH];
    int64_t exact[LENGTH];
    int64_t i;
    int h;
    o.sequences = 3;
    o.sinks = 2;
    o.window = 4;
    o.ring = 4;
    CHECK(tq_paged_create(&o, &cache) == TQ_OK);
    CHECK(tq_workspace_create(&workspace) == TQ_OK);
    for (i = 0; i < LENGTH; ++i) {
        slots[i] = (int64_t)kTable[0][i / PAGE] * PAGE + i % PAGE;
        exact[i] = i < 2 ? 2 * 6 + i : i >= LENGTH - 4 ? 2 * 6 + 2 + (i - 2) % 4 : -1;
    }
    memset(&r, 0, sizeof r);
    r.struct_size = sizeof r;
    r.keys = keys;
    r.values = values;
    r.key_stride = ELEMENTS;
    r.value_stride = ELEMENTS;
    r.n = LENGTH;
    r.slots = slots;
    r.exact_rows = exact;
    CHECK(tq_paged_write(cache, &r) == TQ_OK);
    a = attention(lengths, out);
    a.batch = 1;
    a.sequence_slots = sequence_slots;
    a.sliding_window = 1; /* the last token alone: its value, exactly */
    CHECK(tq_paged_attend(cache, &a, workspace) == TQ_OK);
    for (h = 0; h < HEADS; ++h) {
        for (i = 0; i < HEAD; ++i) {
            const float want = values[(LENGTH - 1) * ELEMENTS + h / (HEADS / KV_HEADS) * HEAD + i];
            CHECK(fabsf(out[h * HEAD + i] - want) <= 0.0005f * fabsf(want) + 1e-6f);
        }
    }
    a.sliding_window = 0;
    CHECK(tq_paged_attend(cache, &a, workspace) == TQ_OK);
    /* The first tokens count exactly too: without them the output is another. */
    exact[0] = exact[1] = -1;
    CHECK(tq_paged_write(cache, &r) == TQ_OK);
    a.out = few;
    CHECK(tq_paged_attend(cache, &a, workspace) == TQ_OK);
    CHECK(memcmp(few, out, HEADS * HEAD * sizeof *out) == 0); /* their entries are still there */
    values[0] += 50;
    exact[0] = 2 * 6;
    CHECK(tq_paged_write(cache, &r) == TQ_OK);
    CHECK(tq_paged_attend(cache, &a, workspace) == TQ_OK);
    CHECK(memcmp(few, out, HEADS * HEAD * sizeof *out) != 0);

    a.sequence_slots = NULL;
    CHECK_REFUSED(tq_paged_attend(cache, &a, workspace), "sequence_slots");
    a.sequence_slots = sequence_slots;
    a.q_len = 2;
    CHECK_REFUSED(tq_paged_attend(cache, &a, workspace), "ring 4 is less than window + q_len - 1 = 5");
    exact[7] = 18;
    CHECK_REFUSED(tq_paged_write(cache, &r), "exact_rows[7] is 18, the cache keeps 18");
    tq_paged_destroy(cache);
    tq_workspace_destroy(workspace);
}

static void test_errors(void) {
    int32_t lengths[2] = {LENGTH, OTHER};
    tq_paged_options o = options();
    tq_paged* cache = NULL;
    tq_workspace* workspace = NULL;
    tq_paged_attention a;
    tq_paged_rows r;
    tq_parallel parallel;
    tq_openmp openmp = {two_threads, 0};
    float out[2 * HEADS * HEAD];
    int64_t slot = PAGES * PAGE;
    int64_t slots[2] = {3, 3};
    o.page_size = 32;
    CHECK(tq_paged_page_bytes(&o) == 0);
    CHECK(strstr(tq_last_error(), "page_size 32") != NULL);
    CHECK_REFUSED(tq_paged_create(&o, &cache), "multiple of 64 tokens");
    o = options();
    o.key_bits = 7;
    CHECK_REFUSED(tq_paged_create(&o, &cache), "7 bits");
    o.key_bits = 16;
    CHECK_REFUSED(tq_paged_create(&o, &cache), "16 bits");
    o = options();
    o.window = 3;
    CHECK_REFUSED(tq_paged_create(&o, &cache), "window 3");
    o = options();
    o.head_size = 66;
    CHECK_REFUSED(tq_paged_create(&o, &cache), "head size 66");
    o = options();
    o.n_pages = 0;
    CHECK_REFUSED(tq_paged_create(&o, &cache), "n_pages 0");
    CHECK(cache == NULL);
    o = options();
    CHECK(tq_paged_create(&o, &cache) == TQ_OK);
    CHECK(tq_workspace_create(&workspace) == TQ_OK);
    memset(&r, 0, sizeof r);
    r.struct_size = sizeof r;
    r.keys = keys;
    r.values = values;
    r.key_stride = ELEMENTS;
    r.value_stride = ELEMENTS;
    r.n = 1;
    r.slots = &slot;
    CHECK_REFUSED(tq_paged_write(cache, &r), "slots[0] is 512");
    r.n = 2;
    r.slots = slots;
    CHECK_REFUSED(tq_paged_write(cache, &r), "row 3 comes twice");
    r.value_stride = 7;
    CHECK_REFUSED(tq_paged_write(cache, &r), "strides");
    CHECK_REFUSED(tq_paged_read(cache, &slot, 1, NULL, NULL, out, 0, NULL), "slots[0] is 512");
    a = attention(lengths, out);
    a.heads = 5;
    CHECK_REFUSED(tq_paged_attend(cache, &a, workspace), "heads 5");
    a.heads = HEADS;
    lengths[1] = TABLE * PAGE + 1;
    CHECK_REFUSED(tq_paged_attend(cache, &a, workspace), "lengths[1] is 193");
    lengths[1] = TABLE * PAGE;
    CHECK_REFUSED(tq_paged_attend(cache, &a, workspace), "page_table[1, 2] is -7");
    CHECK_REFUSED(tq_paged_attend(cache, &a, NULL), "workspace");
    CHECK_REFUSED(tq_openmp_threads(&openmp, &parallel), "n_threads 0");
    tq_paged_destroy(cache);
    tq_paged_destroy(NULL);
    tq_workspace_destroy(workspace);
}

int main(void) {
    test_pages();
    test_exact_rows();
    test_errors();
    if (failures == 0) {
        printf("ok\n");
    }
    return failures != 0;
}
