/* Whole files: bounded reads, durable atomic writes, read-only maps, locks, folders. Every error names the path and
 * errno. */
#ifndef BASE_FILE_H
#define BASE_FILE_H

#include "base/buffer.h"

/* Appends the file's bytes to out, whose max bounds it. ERR_NOT_FOUND, ERR_RESOURCES when larger than the bound. */
int MUST_USE file_read(const char *path, struct buffer *out, struct error *err);

/* Writes path.tmp, fsyncs, renames over path and fsyncs the folder: the old or the new file, never a mixture. */
int MUST_USE file_write_atomic(const char *path, struct span data, unsigned mode, struct error *err);

/* mkdir -p with mode for new folders. */
int MUST_USE file_make_folder(const char *path, unsigned mode, struct error *err);

bool file_exists(const char *path);

/* Holds path (made when missing) for this process until file_unlock or its end. ERR_AGAIN when another process has it.
 */
int MUST_USE file_lock(const char *path, int *ret_lock, struct error *err);
void file_unlock(int lock); /* -1: none */

/* A read-only private map of a whole file; release with file_unmap. An empty file gives an empty span. */
int MUST_USE file_map(const char *path, struct span *ret_map, struct error *err);
void file_unmap(struct span map);
/* For a map that will hardly be read any more, though it may be: its pages leave this process's memory. Only for what
 * file_map gave. */
void file_map_rest(struct span map);

/* folder + "/" + name into out; asserts that it fits. */
void file_join(char *out, size_t size, const char *folder, const char *name);

#endif
