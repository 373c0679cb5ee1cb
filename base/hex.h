/* Lower-case hexadecimal. */
#ifndef BASE_HEX_H
#define BASE_HEX_H

#include "base/error.h"

/* out holds 2·len + 1 bytes. */
void hex_encode(const uint8_t *data, size_t len, char *out);
/* text must be exactly 2·len digits of either case; ERR_INTEGRITY otherwise. */
int MUST_USE hex_decode(const char *text, uint8_t *out, size_t len);

#endif
