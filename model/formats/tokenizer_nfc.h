/* Unicode's normalisation form C (UAX #15) with utf8proc's tables, in linear time whatever the text holds (utf8proc's
 * own ordering of combining marks is quadratic). Pure functions. */
#ifndef FORMATS_TOKENIZER_NFC_H
#define FORMATS_TOKENIZER_NFC_H

#include "base/buffer.h"

#define TOKENIZER_NFC_GROWTH 3 /* bytes of a text in NFC for a byte of the text, at most (UAX #15) */

/* True only if the text is in NFC; false if it may not be. Cheap. */
bool tokenizer_is_nfc(struct span text);

/* Replaces out's contents by the text in NFC. Bytes that are not UTF-8 stay, and nothing combines across them.
 * ERR_RESOURCES without memory or past out's maximum. */
int MUST_USE tokenizer_compose(struct span text, struct buffer *out, struct error *err);

#endif
