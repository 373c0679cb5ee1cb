/* cmocka with the headers that it needs, and a folder of its own for each test. */
#ifndef TESTS_PRIVACY_SUPPORT_H
#define TESTS_PRIVACY_SUPPORT_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#define assert_near(value, expected, tolerance)                                                                        \
    do {                                                                                                               \
        double near_value = (value), near_expected = (expected);                                                       \
        if (!(fabs(near_value - near_expected) <= (tolerance)))                                                        \
            fail_msg("%s = %.12g, expected %.12g", #value, near_value, near_expected);                                 \
    } while (0)

#endif
