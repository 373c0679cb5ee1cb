#include "base/arena.h"
#include "base/buffer.h"
#include "base/checked.h"
#include "base/clock.h"
#include "base/file.h"
#include "base/hex.h"
#include "base/reader.h"

#include "tests/check.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

static void test_round_trip(void)
{
    struct buffer b;
    struct reader r;
    char name[16];

    buffer_init(&b, 1024);
    buffer_u8(&b, 7);
    buffer_u16(&b, 0x1234);
    buffer_u32(&b, 0xdeadbeef);
    buffer_u64(&b, 0x0123456789abcdefULL);
    buffer_f64(&b, -0.5);
    buffer_string(&b, "clinic-a");
    CHECK(buffer_ok(&b));
    r = reader_of(buffer_span(&b));
    CHECK(reader_u8(&r) == 7);
    CHECK(reader_u16(&r) == 0x1234);
    CHECK(reader_u32(&r) == 0xdeadbeef);
    CHECK(reader_u64(&r) == 0x0123456789abcdefULL);
    CHECK(reader_f64(&r) == -0.5);
    reader_string(&r, name, sizeof name);
    CHECK(strcmp(name, "clinic-a") == 0);
    CHECK(reader_done(&r));
    /* Every truncation fails and none reads past its end (asan). */
    for (size_t n = 0; n < b.len; n++) {
        r = reader_of(span_of(b.data, n));
        reader_u8(&r), reader_u16(&r), reader_u32(&r), reader_u64(&r), reader_f64(&r);
        reader_string(&r, name, sizeof name);
        CHECK(!reader_done(&r));
    }
    buffer_u8(&b, 0);
    r = reader_of(buffer_span(&b));
    reader_take(&r, b.len - 1);
    CHECK(!reader_done(&r)); /* trailing bytes are refused */
    buffer_release(&b);
}

static void test_bounds(void)
{
    struct buffer b;
    struct reader r;
    const uint8_t huge[] = {0xff, 0xff, 0xff, 0xff, 1};
    size_t n = 5;

    buffer_init(&b, 10);
    buffer_append(&b, "0123456789", 10);
    CHECK(buffer_ok(&b));
    buffer_u8(&b, 1);
    CHECK(!buffer_ok(&b) && b.len == 10);
    buffer_release(&b);
    r = reader_of(span_of(huge, sizeof huge));
    CHECK(reader_count(&r, UINT32_MAX, 1) == 0 && r.failed);
    CHECK(!checked_add(SIZE_MAX, 1, &n) && n == 5);
    CHECK(!checked_mul(SIZE_MAX / 2, 3, &n) && n == 5);
    CHECK(!checked_align(SIZE_MAX, 64, &n) && n == 5);
    CHECK(checked_align(65, 64, &n) && n == 128);
}

static void test_hex(void)
{
    uint8_t bytes[4];
    char text[9];

    CHECK(hex_decode("00fFa9C3", bytes, 4) == 0);
    hex_encode(bytes, 4, text);
    CHECK(strcmp(text, "00ffa9c3") == 0);
    CHECK(hex_decode("00ff", bytes, 4) == ERR_INTEGRITY);
    CHECK(hex_decode("00ffa9cg", bytes, 4) == ERR_INTEGRITY);
}

/* Whether the page is in this process's memory: bit 63 of its word in Linux's pagemap. */
static bool page_present(const void *at)
{
    uint64_t word = 0;
    const int fd = open("/proc/self/pagemap", O_RDONLY);
    const off_t where = (off_t)((uintptr_t)at / (uintptr_t)sysconf(_SC_PAGESIZE) * sizeof word);
    CHECK(fd >= 0 && pread(fd, &word, sizeof word, where) == sizeof word);
    close(fd);
    return word >> 63 & 1;
}

static void test_files(void)
{
    char folder[] = "/tmp/consilium-test-XXXXXX", path[128];
    struct error err = {0};
    struct buffer b;
    struct span map;

    CHECK(mkdtemp(folder) != NULL);
    file_join(path, sizeof path, folder, "a");
    CHECK(file_write_atomic(path, span_str("first"), 0600, &err) == 0);
    CHECK(file_write_atomic(path, span_str("second"), 0600, &err) == 0);
    buffer_init(&b, 6);
    CHECK(file_read(path, &b, &err) == 0);
    CHECK(b.len == 6 && memcmp(b.data, "second", 6) == 0);
    buffer_release(&b);
    buffer_init(&b, 5);
    CHECK(file_read(path, &b, &err) == ERR_RESOURCES && strstr(err.message, "limit of 5") != NULL);
    buffer_release(&b);
    char pipe_path[160];
    snprintf(pipe_path, sizeof pipe_path, "%s.pipe", path);
    CHECK(mkfifo(pipe_path, 0600) == 0 && file_map(pipe_path, &map, &err) == ERR_CONFIG && unlink(pipe_path) == 0);
    CHECK(file_map(path, &map, &err) == 0 && map.len == 6);
    const uint8_t first = map.ptr[0];
    CHECK(page_present(map.ptr));
    file_map_rest(map);
    CHECK(!page_present(map.ptr) && map.ptr[0] == first && page_present(map.ptr));
    file_map_rest(span_of(NULL, 0));
    file_unmap(map);
    unlink(path);
    buffer_init(&b, 5);
    CHECK(file_read(path, &b, &err) == ERR_NOT_FOUND && strstr(err.message, path) != NULL);
    buffer_release(&b);
    CHECK(file_make_folder(folder, 0700, &err) == 0);

    int lock = -1, second = -1;
    CHECK(file_lock(path, &lock, &err) == 0);
    CHECK(file_lock(path, &second, &err) == ERR_AGAIN && second == -1); /* another holder, be it this process */
    file_unlock(lock);
    CHECK(file_lock(path, &second, &err) == 0);
    file_unlock(second);
    file_unlock(-1);
    unlink(path);
    rmdir(folder);
}

static void test_errors_and_time(void)
{
    struct error err = {0};
    char when[CLOCK_RFC3339_SIZE];

    CHECK(error_set(&err, ERR_POLICY, "epsilon %d over budget", 9) == ERR_POLICY);
    CHECK(error_prefix(&err, "job %s", "icd") == ERR_POLICY);
    CHECK(strcmp(err.message, "job icd: epsilon 9 over budget") == 0);
    CHECK(error_exit_code(ERR_POLICY) == 5 && error_exit_code(0) == 0 && error_exit_code(ERR_AGAIN) == 1);
    clock_format_rfc3339(951827696789, when);
    CHECK(strcmp(when, "2000-02-29T12:34:56.789Z") == 0);
}

static void test_arena(void)
{
    struct arena a;
    uint8_t *first, *second;

    CHECK(arena_init(&a, arena_cost(3) + arena_cost(64)) == 0);
    first = arena_take(&a, 3);
    second = arena_take(&a, 64);
    CHECK(((uintptr_t)first & 63) == 0 && second - first == 64 && a.used == a.size);
    arena_release(&a);
}

int main(void)
{
    RUN(test_round_trip);
    RUN(test_bounds);
    RUN(test_hex);
    RUN(test_files);
    RUN(test_errors_and_time);
    RUN(test_arena);
    return check_report();
}
