/* The listening socket of runtime/http: parsed, checked, bound here so that every failure names the address. */
#ifndef RUNTIME_HTTP_LISTEN_H
#define RUNTIME_HTTP_LISTEN_H

#include "base/error.h"

/* A listening, non-blocking socket; address gets what http_address returns. ERR_CONFIG, ERR_CONNECT. */
int MUST_USE http_listen(const char *listen, unsigned unix_mode, bool allow_any_address, int *ret_fd, char *address,
                         size_t address_size, struct error *err);

#endif
