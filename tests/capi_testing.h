/* What the C tests of the C interface share. */
#pragma once

#include "turboquant/turboquant.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures = 0;

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s; last error: %s\n", __FILE__, __LINE__, #condition, tq_last_error());           \
            ++failures;                                                                                                \
        }                                                                                                              \
    } while (0)

#define CHECK_REFUSED(call, words)                                                                                     \
    do {                                                                                                               \
        CHECK((call) == TQ_INVALID_ARGUMENT);                                                                          \
        CHECK(strstr(tq_last_error(), words) != NULL);                                                                 \
    } while (0)

/* About normal: the sum of twelve uniform numbers, less its mean. */
static float noise(void) {
    float sum = 0;
    int i;
    for (i = 0; i < 12; ++i) {
        sum += (float)rand() / (float)RAND_MAX;
    }
    return sum - 6.0f;
}
