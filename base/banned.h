/* Functions that must not be used in this tree. Included by base/error.h, hence everywhere. */
#ifndef BASE_BANNED_H
#define BASE_BANNED_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#pragma GCC poison strcpy strcat sprintf vsprintf gets atoi atol atoll atof rand srand strtok

#endif
