/* For the tests of kernels/cuda that compare whole matrices: vectors on the device, rows with guards around them. */
#ifndef TESTS_CUDA_ROWS_H
#define TESTS_CUDA_ROWS_H

#include <algorithm>
#include <vector>

#include "kernels/cuda/internal.h"
#include "tests/cuda/support.h"

/* A copy of a vector on the device. */
template <typename T> struct device_vector {
    T *at;
    size_t count;

    explicit device_vector(const std::vector<T> &values) : at(NULL), count(values.size())
    {
        support_ok(device_alloc((count ? count : 1) * sizeof(T), reinterpret_cast<void **>(&at)));
        set(values);
    }
    device_vector(const device_vector &) = delete;
    device_vector &operator=(const device_vector &) = delete;
    ~device_vector()
    {
        device_release(at);
    }
    void set(const std::vector<T> &values)
    {
        if (count)
            device_upload((stream_t)0, at, values.data(), count * sizeof(T));
        support_sync();
    }
    std::vector<T> get() const
    {
        std::vector<T> values(count);
        if (count)
            device_download((stream_t)0, values.data(), at, count * sizeof(T));
        support_sync();
        return values;
    }
};

static inline std::vector<float> random_floats(size_t n)
{
    std::vector<float> x(n);
    for (float &v : x)
        v = support_uniform();
    return x;
}

/* Values that an element of the type holds exactly: what the kernel and the reference are both fed with. */
static inline std::vector<float> random_elements(enum tensor_type type, size_t n)
{
    std::vector<float> x = random_floats(n);
    for (float &v : x)
        v = host_round(v, type);
    return x;
}

#define CHECK_CLOSE(got, want, tolerance)                                                                              \
    do {                                                                                                               \
        std::vector<float> got_values = (got), want_values = (want);                                                   \
        CHECK(got_values.size() == want_values.size());                                                                \
        CHECK_DISTANCE(got_values.data(), want_values.data(), want_values.size(), tolerance);                          \
    } while (0)

/* Rows (m, n) in a matrix of `type` whose rows are `stride` apart, from column `column` on. Everything is 0xff bytes
 * (NaN) until it is set, and there is one row more before and behind. */
struct device_rows {
    enum tensor_type type;
    int32_t m, n, stride, column;
    device_vector<uint8_t> memory;

    device_rows(enum tensor_type type_, int32_t m_, int32_t n_, int32_t stride_, int32_t column_ = 0)
        : type(type_), m(m_), n(n_), stride(stride_), column(column_),
          memory(std::vector<uint8_t>(((size_t)m_ + 2) * (size_t)stride_ * (type_ == TENSOR_F32 ? 4 : 2), 0xff))
    {
    }
    device_rows(enum tensor_type type_, int32_t m_, int32_t n_, int32_t stride_, int32_t column_,
                const std::vector<float> &values)
        : device_rows(type_, m_, n_, stride_, column_)
    {
        set(values);
    }
    size_t size() const
    {
        return type == TENSOR_F32 ? 4 : 2;
    }
    size_t offset(int32_t row, int32_t c) const
    {
        return ((size_t)(row + 1) * (size_t)stride + (size_t)(column + c)) * size();
    }
    struct rows rows(int32_t c = 0) const /* from its column c on */
    {
        return {memory.at + offset(0, c), stride};
    }
    void set(const std::vector<float> &values)
    {
        std::vector<uint8_t> bytes = memory.get();
        for (int32_t t = 0; t < m; t++) {
            for (int32_t i = 0; i < n; i++) {
                float v = values[(size_t)t * (size_t)n + (size_t)i];
                bf16 h = host_bf16(v);
                memcpy(&bytes[offset(t, i)], type == TENSOR_F32 ? (void *)&v : (void *)&h, size());
            }
        }
        memory.set(bytes);
    }
    std::vector<float> get() const
    {
        std::vector<uint8_t> bytes = memory.get();
        std::vector<float> values((size_t)m * (size_t)n);
        for (int32_t t = 0; t < m; t++) {
            for (int32_t i = 0; i < n; i++) {
                float v;
                bf16 h;
                memcpy(&v, &bytes[offset(t, i)], size());
                memcpy(&h, &bytes[offset(t, i)], 2);
                values[(size_t)t * (size_t)n + (size_t)i] = type == TENSOR_F32 ? v : host_float(h);
            }
        }
        return values;
    }
    /* Nothing outside the rows' columns was written. */
    bool guarded() const
    {
        std::vector<uint8_t> bytes = memory.get();
        for (int32_t t = 0; t < m; t++)
            memset(bytes.data() + offset(t, 0), 0xff, (size_t)n * size());
        return std::all_of(bytes.begin(), bytes.end(), [](uint8_t b) { return b == 0xff; });
    }
};

#endif
