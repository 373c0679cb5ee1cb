/*
 * The plain test harness of the core (base, kernels, model), which must build with nothing but a C compiler.
 *
 *     int main(void) { RUN(test_rope_inverse); return check_report(); }
 */
#ifndef TESTS_CHECK_H
#define TESTS_CHECK_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int check_failures, check_count;

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        check_count++;                                                                                                 \
        if (!(condition)) {                                                                                            \
            check_failures++;                                                                                          \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);                                    \
        }                                                                                                              \
    } while (0)

/* |got − want| ≤ tolerance · max(1, |want|); NaN fails. */
#define CHECK_NEAR(got, want, tolerance)                                                                               \
    do {                                                                                                               \
        double got_ = (got), want_ = (want);                                                                           \
        check_count++;                                                                                                 \
        if (!(fabs(got_ - want_) <= (tolerance)*fmax(1.0, fabs(want_)))) {                                             \
            check_failures++;                                                                                          \
            fprintf(stderr, "%s:%d: %s = %.9g, expected %.9g within %g\n", __FILE__, __LINE__, #got, got_, want_,      \
                    (double)(tolerance));                                                                              \
        }                                                                                                              \
    } while (0)

#define RUN(test)                                                                                                      \
    do {                                                                                                               \
        int before_ = check_failures;                                                                                  \
        test();                                                                                                        \
        fprintf(stderr, "[%s] %s\n", check_failures == before_ ? "  ok  " : "FAILED", #test);                          \
    } while (0)

/* The program's exit code. No check executed counts as a failure. */
static inline int check_report(void)
{
    fprintf(stderr, "%d checks, %d failed\n", check_count, check_failures);
    return check_failures || check_count == 0 ? 1 : 0;
}

#endif
