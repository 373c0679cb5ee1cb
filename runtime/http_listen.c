#include "runtime/http_listen.h"

#include "runtime/text.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

static int close_with(int fd, int rc)
{
    if (fd >= 0)
        close(fd);
    return rc;
}

/* True when something accepts connections at the path. */
static bool answers(const struct sockaddr_un *address)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return true;
    bool alive = connect(fd, (const struct sockaddr *)address, sizeof *address) == 0 || errno == EAGAIN;
    close(fd);
    return alive;
}

static int listen_unix(const char *path, unsigned mode, int *ret_fd, struct error *err)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct stat st;
    if (!*path || strlen(path) >= sizeof address.sun_path)
        return error_set(err, ERR_CONFIG, "unix:%s: expected a socket path of 1 to %zu bytes", path,
                         sizeof address.sun_path - 1);
    snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
    if (lstat(path, &st) == 0) {
        if (!S_ISSOCK(st.st_mode))
            return error_set(err, ERR_CONNECT, "unix:%s: exists and is no socket; remove it or name another path",
                             path);
        if (answers(&address))
            return error_set(err, ERR_CONNECT, "unix:%s: another process listens there", path);
        unlink(path);
    }
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    mode_t saved = umask(0177); /* the file is private from its first moment */
    int bound = fd < 0 ? -1 : bind(fd, (struct sockaddr *)&address, sizeof address);
    int code = errno;
    umask(saved);
    errno = code;
    if (bound < 0 || chmod(path, mode ? mode : 0600) < 0 || listen(fd, 64) < 0)
        return close_with(fd, error_set(err, ERR_CONNECT, "unix:%s: cannot listen: %s", path, strerror(errno)));
    *ret_fd = fd;
    return 0;
}

union any_address {
    struct sockaddr base;
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
};

static int parse_tcp(const char *text, union any_address *ret_address, socklen_t *ret_len, bool *ret_loopback)
{
    char host[64];
    int64_t port;
    const char *colon = strrchr(text, ':');
    size_t len = colon ? (size_t)(colon - text) : 0;
    if (!colon || len == 0 || len >= sizeof host || text_parse_int(colon + 1, &port) < 0 || port < 0 || port > 65535)
        return ERR_CONFIG;
    bool bracketed = text[0] == '[' && colon[-1] == ']';
    snprintf(host, sizeof host, "%.*s", (int)(bracketed ? len - 2 : len), text + bracketed);
    if (strcmp(host, "localhost") == 0)
        snprintf(host, sizeof host, "127.0.0.1");
    memset(ret_address, 0, sizeof *ret_address);
    if (!bracketed && inet_pton(AF_INET, host, &ret_address->v4.sin_addr) == 1) {
        ret_address->v4.sin_family = AF_INET;
        ret_address->v4.sin_port = htons((uint16_t)port);
        *ret_loopback = ntohl(ret_address->v4.sin_addr.s_addr) >> 24 == 127;
        *ret_len = sizeof ret_address->v4;
        return 0;
    }
    if (bracketed && inet_pton(AF_INET6, host, &ret_address->v6.sin6_addr) == 1) {
        ret_address->v6.sin6_family = AF_INET6;
        ret_address->v6.sin6_port = htons((uint16_t)port);
        *ret_loopback = IN6_IS_ADDR_LOOPBACK(&ret_address->v6.sin6_addr);
        *ret_len = sizeof ret_address->v6;
        return 0;
    }
    return ERR_CONFIG;
}

static int listen_tcp(const char *text, bool allow_any, int *ret_fd, char *out, size_t out_size, struct error *err)
{
    union any_address address;
    socklen_t len = 0;
    bool loopback = false;
    if (parse_tcp(text, &address, &len, &loopback) < 0)
        return error_set(err, ERR_CONFIG, "%.100s: expected unix:/path, 127.0.0.1:PORT or [::1]:PORT", text);
    if (!loopback && !allow_any)
        return error_set(err, ERR_CONFIG, "%s: only loopback addresses are allowed here; put a TLS proxy in front",
                         text);
    int one = 1, fd = socket(address.base.sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return error_set(err, ERR_CONNECT, "%s: cannot make a socket: %s", text, strerror(errno));
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, &address.base, len) < 0 || listen(fd, 128) < 0)
        return close_with(fd,
                          error_set(err, ERR_CONNECT,
                                    errno == EADDRINUSE ? "%s: the port is taken by another process (%s); stop it or "
                                                          "choose another port"
                                                        : "%s: cannot listen: %s",
                                    text, strerror(errno)));
    if (getsockname(fd, &address.base, &len) < 0)
        return close_with(fd, error_set(err, ERR_CONNECT, "%s: %s", text, strerror(errno)));
    unsigned port = ntohs(address.base.sa_family == AF_INET ? address.v4.sin_port : address.v6.sin6_port);
    snprintf(out, out_size, "http://%.*s:%u", (int)(strrchr(text, ':') - text), text, port);
    *ret_fd = fd;
    return 0;
}

int http_listen(const char *listen_text, unsigned unix_mode, bool allow_any_address, int *ret_fd, char *address,
                size_t address_size, struct error *err)
{
    if (strncmp(listen_text, "unix:", 5) == 0) {
        snprintf(address, address_size, "%s", listen_text);
        return listen_unix(listen_text + 5, unix_mode, ret_fd, err);
    }
    return listen_tcp(listen_text, allow_any_address, ret_fd, address, address_size, err);
}
