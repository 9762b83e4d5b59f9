/* The C interface as another engine uses it: create, write, attend, size, errors, destroy. */
#include "capi_testing.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HEAD 64
#define KV_HEADS 2
#define HEADS 4
#define ROWS 150
#define ELEMENTS (HEAD * KV_HEADS)

static tq_store* make_store(int32_t side, int bits, int window, tq_batch* batch) {
    static float x[ROWS * ELEMENTS];
    tq_store_options options;
    tq_store* store = NULL;
    int64_t rows[ROWS];
    size_t bytes = 0;
    int i;
    memset(&options, 0, sizeof options);
    options.struct_size = sizeof options;
    options.side = side;
    options.head_size = HEAD;
    options.kv_heads = KV_HEADS;
    options.rows = ROWS;
    options.bits = bits;
    options.window = window;
    options.sink_slots = 2;
    CHECK(tq_store_bytes(&options, &bytes) == TQ_OK);
    CHECK(tq_store_create(&options, &store) == TQ_OK);
    CHECK(store != NULL && tq_store_size(store) == bytes && bytes > 0);
    for (i = 0; i < ROWS * ELEMENTS; ++i) {
        x[i] = noise();
    }
    for (i = 0; i < ROWS; ++i) {
        rows[i] = i;
    }
    /* The context, then a batch of 50 rows. */
    CHECK(tq_store_write(store, x, ELEMENTS, rows, 100, batch) == TQ_OK);
    CHECK(tq_store_pin(store, 3, batch) == TQ_OK);
    CHECK(tq_store_write(store, x + 100 * ELEMENTS, ELEMENTS, rows + 100, 50, batch) == TQ_OK);
    return store;
}

static float key[ROWS][ELEMENTS];
static float value[ROWS][ELEMENTS];

/* Largest difference between out and softmax(q K^T) V over rows [0, seen), relative to the largest output. */
static double error_of(const float* q, const float* out, int64_t seen) {
    double worst = 0;
    double largest = 0;
    int h;
    for (h = 0; h < HEADS; ++h) {
        const int at = h / (HEADS / KV_HEADS) * HEAD;
        double p[ROWS];
        double sum = 0;
        int64_t r;
        int c;
        for (r = 0; r < seen; ++r) {
            double s = 0;
            for (c = 0; c < HEAD; ++c) {
                s += (double)q[h * HEAD + c] * key[r][at + c];
            }
            p[r] = exp(s / 8);
            sum += p[r];
        }
        for (c = 0; c < HEAD; ++c) {
            double want = 0;
            for (r = 0; r < seen; ++r) {
                want += p[r] / sum * value[r][at + c];
            }
            worst = fmax(worst, fabs(want - out[h * HEAD + c]));
            largest = fmax(largest, fabs(want));
        }
    }
    return worst / largest;
}

static int tasks_run = 0;
static void run_backwards(void* context, int64_t n_tasks, void (*task)(void* arg, int64_t index, int worker),
                          void* arg) {
    CHECK(context == &tasks_run);
    while (n_tasks-- > 0) {
        task(arg, n_tasks, (int)(n_tasks % 2));
        ++tasks_run;
    }
}

static void test_attention(void) {
    tq_batch* key_batch = NULL;
    tq_batch* value_batch = NULL;
    tq_workspace* workspace = NULL;
    tq_store* k;
    tq_store* v;
    tq_attention call;
    float q[HEADS * HEAD];
    float out[HEADS * HEAD];
    float staged[HEADS * HEAD];
    uint16_t mask[ROWS];
    int64_t r;
    int i;
    CHECK(tq_batch_create(&key_batch) == TQ_OK);
    CHECK(tq_batch_create(&value_batch) == TQ_OK);
    CHECK(tq_workspace_create(&workspace) == TQ_OK);
    k = make_store(TQ_KEY, 5, 8, key_batch);
    v = make_store(TQ_VALUE, 0 /* 4 */, 8, value_batch);
    for (r = 0; r < ROWS; ++r) {
        CHECK(tq_store_read(k, r, key[r]) == TQ_OK);
        CHECK(tq_store_read(v, r, value[r]) == TQ_OK);
    }
    for (i = 0; i < HEADS * HEAD; ++i) {
        q[i] = noise();
    }
    memset(&call, 0, sizeof call);
    call.struct_size = sizeof call;
    call.q = q;
    call.q_head_stride = HEAD;
    call.n_queries = 1;
    call.n_heads = HEADS;
    call.n_rows = ROWS;
    call.scale = 1.0f / 8;
    call.out = out;
    call.out_head_stride = HEAD;
    CHECK(tq_attend(k, v, &call, workspace) == TQ_OK);
    CHECK(error_of(q, out, ROWS) < 1e-3);

    /* The mask hides the last 30 rows; the caller's threads do the work. */
    for (r = 0; r < ROWS; ++r) {
        mask[r] = r < ROWS - 30 ? 0 : 0xfc00;
    }
    call.mask = mask;
    call.parallel.run = run_backwards;
    call.parallel.context = &tasks_run;
    call.parallel.n_workers = 2;
    CHECK(tq_attend(k, v, &call, workspace) == TQ_OK);
    CHECK(tasks_run > 1);
    CHECK(error_of(q, out, ROWS - 30) < 1e-3);

    /* The query of the batch's row 19 has other exact rows than the store now. */
    call.key_batch = key_batch;
    call.value_batch = value_batch;
    call.batch_offset = 19;
    call.out = staged;
    CHECK(tq_attend(k, v, &call, workspace) == TQ_OK);
    CHECK(memcmp(out, staged, sizeof out) != 0);
    call.batch_offset = 50;
    CHECK(tq_attend(k, v, &call, workspace) == TQ_INVALID_ARGUMENT);
    CHECK(strstr(tq_last_error(), "batch of 50 rows") != NULL);

    CHECK(tq_store_clear(k) == TQ_OK);
    CHECK(tq_store_read(k, 0, key[0]) == TQ_OK);
    CHECK(key[0][0] == 0);
    tq_store_destroy(k);
    tq_store_destroy(v);
    tq_workspace_destroy(workspace);
    tq_batch_destroy(key_batch);
    tq_batch_destroy(value_batch);
}

static void test_errors(void) {
    tq_store_options options;
    tq_attention call;
    tq_store* store = (tq_store*)&options;
    size_t bytes;
    int64_t row = 7;
    float x[64] = {0};
    memset(&options, 0, sizeof options);
    CHECK(tq_store_create(&options, &store) == TQ_INVALID_ARGUMENT);
    CHECK(store == NULL);
    CHECK(strstr(tq_last_error(), "struct_size 0") != NULL);
    options.struct_size = sizeof options + 8;
    CHECK(tq_store_bytes(&options, &bytes) == TQ_INVALID_ARGUMENT);
    options.struct_size = sizeof options;
    options.head_size = 64;
    options.kv_heads = 1;
    options.rows = 7;
    options.bits = 7;
    CHECK(tq_store_create(&options, &store) == TQ_INVALID_ARGUMENT);
    CHECK(strstr(tq_last_error(), "7") != NULL);
    options.bits = 4;
    options.side = 9;
    CHECK(tq_store_create(&options, &store) == TQ_INVALID_ARGUMENT);
    options.side = TQ_KEY;
    CHECK(tq_store_create(&options, NULL) == TQ_INVALID_ARGUMENT);
    CHECK(tq_store_create(NULL, &store) == TQ_INVALID_ARGUMENT);
    CHECK(tq_store_create(&options, &store) == TQ_OK);
    CHECK(tq_store_write(store, x, 64, &row, 1, NULL) == TQ_INVALID_ARGUMENT); /* rows are 0..6 */
    CHECK(tq_store_write(store, x, 64, &row, -1, NULL) == TQ_INVALID_ARGUMENT);
    CHECK(tq_store_write(store, NULL, 64, &row, 1, NULL) == TQ_INVALID_ARGUMENT);
    CHECK(tq_store_write(NULL, x, 64, &row, 1, NULL) == TQ_INVALID_ARGUMENT);
    CHECK(tq_store_read(store, 7, x) == TQ_INVALID_ARGUMENT);
    CHECK(tq_store_read(store, 0, NULL) == TQ_INVALID_ARGUMENT);
    memset(&call, 0, sizeof call);
    call.struct_size = sizeof call;
    CHECK(tq_attend(store, NULL, &call, NULL) == TQ_INVALID_ARGUMENT);
    CHECK(strstr(tq_last_error(), "values is null") != NULL);
    CHECK(tq_store_size(NULL) == 0);
    tq_store_destroy(store);
    tq_store_destroy(NULL);
    tq_workspace_destroy(NULL);
    tq_batch_destroy(NULL);
}

/* A key that is its mean turned to position 4000, give or take a thousandth: with the pair it comes back as that, at its
 * position; without, or with the row's number for a position, it does not. */
static void test_turning_mean(void) {
    const tq_rope_pair pair = {1, 33, 0.0005F};
    float mu[64] = {0};
    float x[64] = {0};
    float back[64];
    const int64_t row = 2;
    const int32_t position = 3967; /* the middle of its block */
    int with;
    mu[1] = 100;
    x[1] = 100 * cosf(0.0005F * 3967.5F);
    x[33] = 100 * sinf(0.0005F * 3967.5F);
    for (with = 0; with < 2; ++with) {
        tq_store_options options;
        tq_store* store = NULL;
        memset(&options, 0, sizeof options);
        options.struct_size = sizeof options;
        options.side = TQ_KEY;
        options.head_size = 64;
        options.kv_heads = 1;
        options.rows = 7;
        options.bits = 2;
        options.mu = mu;
        options.rope = &pair;
        options.n_rope = 1;
        CHECK(tq_store_create(&options, &store) == TQ_OK);
        CHECK(tq_store_write_at(store, x, 64, &row, with ? &position : NULL, 1, NULL) == TQ_OK);
        CHECK(tq_store_read(store, row, back) == TQ_OK);
        if (with) {
            CHECK(fabsf(back[1] - x[1]) < 0.5F && fabsf(back[33] - x[33]) < 0.5F && fabsf(back[7]) < 0.5F);
        } else {
            CHECK(fabsf(back[1] - x[1]) > 0.5F || fabsf(back[33] - x[33]) > 0.5F || fabsf(back[7]) > 0.5F);
        }
        tq_store_destroy(store);
        options.n_rope = 40;
        CHECK(tq_store_create(&options, &store) == TQ_INVALID_ARGUMENT);
        CHECK(strstr(tq_last_error(), "n_rope 40") != NULL);
    }
}

int main(void) {
    int major = 0;
    int minor = 0;
    CHECK(tq_last_error()[0] == '\0');
    CHECK(sscanf(tq_version(), "%d.%d.", &major, &minor) == 2);
    test_attention();
    test_errors();
    test_turning_mean();
    if (failures == 0) {
        printf("ok\n");
    }
    return failures != 0;
}
