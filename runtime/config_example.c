/* The commented example of a schema: configs/ is written by this and a test compares. */
#include "runtime/config_internal.h"

/* Help text wrapped at 100 columns as a comment. */
static void write_comment(struct buffer *out, int indent, const char *text)
{
    size_t width = 100 - (size_t)indent;
    while (*text) {
        size_t len = strcspn(text, "\n"), cut = len;
        if (len > width) {
            for (cut = width; cut > 0 && text[cut] != ' ';)
                cut--;
            cut = cut ? cut : width;
        }
        buffer_printf(out, "%*s# %.*s\n", indent, "", (int)cut, text);
        text += cut;
        text += strspn(text, " \n");
    }
}

static bool needs_quotes(const char *text)
{
    return strpbrk(text, ":#{}[]&*!|>'\"%@`,") != NULL || *text == '-' || *text == ' ' || !*text;
}

static void write_scalar(struct buffer *out, const char *text)
{
    if (!needs_quotes(text)) {
        buffer_printf(out, "%s", text);
        return;
    }
    buffer_printf(out, "\"");
    for (; *text; text++)
        buffer_printf(out, *text == '"' || *text == '\\' ? "\\%c" : "%c", *text);
    buffer_printf(out, "\"");
}

static void write_value(const struct config_key *k, struct buffer *out, const char *text)
{
    if (k->type != CONFIG_LIST) {
        write_scalar(out, text);
        return;
    }
    buffer_printf(out, "[");
    bool first = true;
    while (*text) {
        char item[CONFIG_STRING_MAX];
        text += strspn(text, " ");
        size_t len = strcspn(text, ",");
        snprintf(item, sizeof item, "%.*s", (int)len, text);
        buffer_printf(out, first ? "" : ", ");
        write_scalar(out, item);
        first = false;
        text += len + (text[len] == ',');
    }
    buffer_printf(out, "]");
}

/* Opens the mappings of key that the last key did not share; the number of levels. */
static int write_groups(struct buffer *out, const char *last, const char *key)
{
    int depth = 0;
    size_t start = 0;
    bool shared = true;
    for (size_t dot; key[dot = start + strcspn(key + start, ".")]; start = dot + 1, depth++) {
        shared = shared && strncmp(last, key, dot + 1) == 0;
        if (!shared)
            buffer_printf(out, "%s%*s%.*s:\n", depth == 0 ? "\n" : "", depth * 2, "", (int)(dot - start), key + start);
    }
    if (depth == 0 && strchr(last, '.'))
        buffer_printf(out, "\n");
    return depth;
}

void config_write_example(const struct config_schema *schema, struct buffer *out)
{
    const char *last = "";
    write_comment(out, 0, schema->intro);
    buffer_printf(out, "\nversion: 1\n");
    for (size_t i = 0; i < schema->count; i++) {
        const struct config_key *k = &schema->keys[i];
        char expected[256], line[400];
        int indent = 2 * write_groups(out, last, k->key);
        const char *name = strrchr(k->key, '.') ? strrchr(k->key, '.') + 1 : k->key;
        if (k->help)
            write_comment(out, indent, k->help);
        config_describe(k, expected, sizeof expected);
        expected[0] = (char)(expected[0] - 'a' + 'A');
        snprintf(line, sizeof line, "%s. %s%s%s", expected,
                 k->required ? "Required."
                 : k->text   ? "Default: "
                             : "No default.",
                 k->text && !k->required ? k->text : "", k->text && !k->required ? "." : "");
        write_comment(out, indent, line);
        const char *value = k->example ? k->example : k->text ? k->text : NULL;
        /* A key that shows no value is commented out, so that the example parses. */
        buffer_printf(out, "%*s%s%s:%s", indent, "", value ? "" : "# ", name, value ? " " : "");
        if (value)
            write_value(k, out, value);
        buffer_printf(out, "\n");
        last = k->key;
    }
}
