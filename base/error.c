#include "base/error.h"

#undef error_set /* the analyzer's */

int error_set(struct error *err, int code, const char *format, ...)
{
    if (err) {
        va_list args;
        err->code = code;
        va_start(args, format);
        vsnprintf(err->message, sizeof err->message, format, args);
        va_end(args);
    }
    return code;
}

int error_prefix(struct error *err, const char *format, ...)
{
    char old[sizeof err->message];
    va_list args;
    size_t used;

    if (!err)
        return ERR_FAILED;
    memcpy(old, err->message, sizeof old);
    va_start(args, format);
    vsnprintf(err->message, sizeof err->message, format, args);
    va_end(args);
    used = strlen(err->message);
    snprintf(err->message + used, sizeof err->message - used, ": %.900s", old);
    return err->code;
}

int error_exit_code(int code)
{
    if (code == 0)
        return 0;
    return code <= ERR_FAILED && code >= ERR_BUG ? -code : 1;
}
