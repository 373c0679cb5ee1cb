/* Tables and JSON on stdout. Text of peers and files is shown with control bytes replaced. */
#include "runtime/cli.h"

#include <inttypes.h>

#define COLUMNS_MAX 32
#define CELL_SIZE 160

static void cell_text(const json_t *v, char out[CELL_SIZE])
{
    char *dump = NULL;
    switch (json_typeof(v)) {
    case JSON_STRING:
        snprintf(out, CELL_SIZE, "%s", json_string_value(v));
        break;
    case JSON_INTEGER:
        snprintf(out, CELL_SIZE, "%" JSON_INTEGER_FORMAT, json_integer_value(v));
        break;
    case JSON_REAL:
        snprintf(out, CELL_SIZE, "%.4g", json_real_value(v));
        break;
    case JSON_TRUE:
    case JSON_FALSE:
        snprintf(out, CELL_SIZE, json_is_true(v) ? "yes" : "no");
        break;
    case JSON_NULL:
        snprintf(out, CELL_SIZE, "-");
        break;
    default:
        dump = json_dumps(v, JSON_COMPACT);
        snprintf(out, CELL_SIZE, "%s", dump ? dump : "");
        free(dump);
    }
    for (char *at = out; *at; at++)
        if ((unsigned char)*at < 0x20 || *at == 0x7f)
            *at = '?';
}

/* Columns on a terminal: UTF-8 continuation bytes take none. */
static size_t width_of(const char *text)
{
    size_t n = 0;
    for (; *text; text++)
        n += ((unsigned char)*text & 0xc0) != 0x80;
    return n;
}

static void put_cell(const char *text, size_t width, bool right, bool last)
{
    size_t pad = width - width_of(text);
    if (right)
        printf("%*s%s%s", (int)pad, "", text, last ? "\n" : "  ");
    else if (last)
        printf("%s\n", text);
    else
        printf("%s%*s  ", text, (int)pad, "");
}

static void dump_json(json_t *value)
{
    json_dumpf(value, stdout, JSON_INDENT(2) | JSON_ENSURE_ASCII | JSON_REAL_PRECISION(15));
    printf("\n");
}

static const json_t *field(const json_t *row, const char *column)
{
    char key[64];
    snprintf(key, sizeof key, "%.*s", (int)strcspn(column, ":"), column);
    return json_object_get(row, key);
}

static const char *heading(const char *column)
{
    const char *colon = strchr(column, ':');
    return colon ? colon + 1 : column;
}

void cli_print_rows(const struct cli *cli, json_t *rows, const char *const *columns, size_t columns_count)
{
    size_t width[COLUMNS_MAX], i;
    bool right[COLUMNS_MAX];
    char text[CELL_SIZE];
    json_t *row;
    assert(columns_count <= COLUMNS_MAX);
    if (cli->format == CLI_JSON) {
        dump_json(rows);
        json_decref(rows);
        return;
    }
    for (size_t c = 0; c < columns_count; c++) {
        width[c] = width_of(heading(columns[c]));
        right[c] = json_array_size(rows) > 0;
        json_array_foreach(rows, i, row)
        {
            const json_t *v = field(row, columns[c]);
            if (!v)
                continue;
            cell_text(v, text);
            width[c] = width_of(text) > width[c] ? width_of(text) : width[c];
            right[c] = right[c] && json_is_number(v);
        }
    }
    for (size_t c = 0; c < columns_count; c++)
        put_cell(heading(columns[c]), width[c], right[c], c + 1 == columns_count);
    json_array_foreach(rows, i, row)
    {
        for (size_t c = 0; c < columns_count; c++) {
            const json_t *v = field(row, columns[c]);
            snprintf(text, sizeof text, "-");
            if (v)
                cell_text(v, text);
            put_cell(text, width[c], right[c], c + 1 == columns_count);
        }
    }
    json_decref(rows);
}

static void print_members(const json_t *object, int indent)
{
    const char *key;
    json_t *v;
    size_t width = 0;
    json_object_foreach((json_t *)object, key, v) width = strlen(key) > width ? strlen(key) : width;
    json_object_foreach((json_t *)object, key, v)
    {
        char text[CELL_SIZE];
        if (json_is_object(v) && indent < 8) {
            printf("%*s%s\n", indent, "", key);
            print_members(v, indent + 2);
            continue;
        }
        cell_text(v, text);
        printf("%*s%-*s  %s\n", indent, "", (int)width, key, text);
    }
}

void cli_print_object(const struct cli *cli, json_t *object)
{
    if (cli->format == CLI_JSON)
        dump_json(object);
    else
        print_members(object, 0);
    json_decref(object);
}

void cli_print_line(const struct cli *cli, const char *format, ...)
{
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (cli->format == CLI_JSON) {
        json_t *object = json_pack("{s:s}", "message", text);
        if (object)
            dump_json(object);
        json_decref(object);
    } else {
        printf("%s\n", text);
    }
}
