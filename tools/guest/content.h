/* Page content that can be regenerated at any time, so that every owned byte can be checked. */
#ifndef CONTENT_H
#define CONTENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAGE_BYTES 4096u
#define PAGE_WORDS (PAGE_BYTES / 8u)

enum content {
    CONTENT_ZERO,
    CONTENT_RANDOM,    /* does not compress */
    CONTENT_TEXT,      /* word-like, compresses to about a quarter */
    CONTENT_HALF,      /* first 2048 bytes random, second 2048 bytes from a small vocabulary */
    CONTENT_FILE,      /* bytes of the files of the initramfs */
    CONTENT_DUPLICATE, /* random, but one of 64 pages only */
    CONTENT_COUNTER,   /* numbers that grow with the stamp */
};

/* Mix all bits of a 64-bit word (the finaliser of splitmix64). */
uint64_t mix64(uint64_t x);

/* One step of the xorshift64 generator; *state must not be 0. */
uint64_t xorshift64(uint64_t *state);

/* Build the vocabularies and map the files that CONTENT_FILE takes its bytes from. */
void content_init(uint64_t seed);

/*
 * Write words [first, first + count) of a page into out[0..count). The same arguments always give
 * the same words; `stamp` tells one version of a page (or part) from the next.
 */
void content_fill(uint64_t *out, enum content kind, uint64_t page, uint64_t stamp,
                  unsigned first, unsigned count);

#endif
