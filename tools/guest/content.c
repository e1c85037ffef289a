#include "content.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define TEXT_TOKENS 1024u /* 10 bits of choice per 8 bytes */
#define DUPLICATES 64u
#define FILE_BYTES_MAX (64u << 20)
#define LAP_SHIFT 520u /* each lap over the files starts elsewhere in a page: no duplicate pages */

static uint64_t seed;
static uint64_t tokens[TEXT_TOKENS];
static const uint8_t *file_bytes;
static size_t file_length;

uint64_t mix64(uint64_t x)
{
    x ^= x >> 30;
    x *= 0xbf58476d1ce4e5b9u;
    x ^= x >> 27;
    x *= 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

uint64_t xorshift64(uint64_t *state)
{
    uint64_t x = *state;

    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return *state = x;
}

static void make_tokens(void)
{
    static const char syllables[16][4] = {"the", "ing", "er ", "ion", "st ", "and", "re ", "ver",
                                          "mig", "rat", "pa ", "ge ", "lo ", "ad ", "com", "su "};

    for (unsigned i = 0; i < TEXT_TOKENS; i++) {
        uint64_t r = mix64(i + 1);
        char word[9];

        snprintf(word, sizeof(word), "%s%s%c ", syllables[r & 15], syllables[(r >> 4) & 15],
                 (char)('a' + (r >> 8) % 26));
        memcpy(&tokens[i], word, 8);
    }
}

static void map_file(uint8_t *arena, const char *path)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0)
        return;
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && st.st_size >= (off_t)PAGE_BYTES) {
        size_t length = (size_t)st.st_size & ~(size_t)(PAGE_BYTES - 1); /* whole pages only */

        if (file_length + length <= FILE_BYTES_MAX &&
            mmap(arena + file_length, length, PROT_READ, MAP_PRIVATE | MAP_FIXED, fd, 0) != MAP_FAILED)
            file_length += length;
    }
    close(fd);
}

/* Lay the files side by side; their pages are the initramfs's own, so this costs no memory. */
static void map_files(void)
{
    static const char *const folders[] = {"/bin", "/lib/modules"};
    uint8_t *arena = mmap(NULL, FILE_BYTES_MAX, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (arena == MAP_FAILED)
        return;
    for (unsigned i = 0; i < sizeof(folders) / sizeof(folders[0]); i++) {
        DIR *dir = opendir(folders[i]);
        struct dirent *entry;
        char path[512];

        while (dir && (entry = readdir(dir)) != NULL) {
            snprintf(path, sizeof(path), "%s/%s", folders[i], entry->d_name);
            map_file(arena, path);
        }
        if (dir)
            closedir(dir);
    }
    file_bytes = arena;
}

void content_init(uint64_t new_seed)
{
    seed = new_seed;
    make_tokens();
    map_files();
}

static void fill_random(uint64_t *out, uint64_t state, unsigned count)
{
    for (unsigned i = 0; i < count; i++)
        out[i] = xorshift64(&state);
}

/* `bits` random bits choose each token of a vocabulary of 2^bits. */
static void fill_tokens(uint64_t *out, uint64_t state, unsigned count, unsigned bits)
{
    uint64_t pool = 0;
    unsigned left = 0;

    for (unsigned i = 0; i < count; i++) {
        if (left < bits) {
            pool = xorshift64(&state);
            left = 64;
        }
        out[i] = tokens[pool & ((1u << bits) - 1)];
        pool >>= bits;
        left -= bits;
    }
}

static void fill_file(uint64_t *out, uint64_t page, unsigned first, unsigned count)
{
    size_t span, offset;

    if (file_length < 4 * PAGE_BYTES) {
        memset(out, 0, count * 8u);
        return;
    }
    span = file_length - PAGE_BYTES;
    offset = page * PAGE_BYTES % span;
    offset = (offset + page * PAGE_BYTES / span * LAP_SHIFT) % span;
    memcpy(out, file_bytes + offset + first * 8u, count * 8u);
}

static void fill_half(uint64_t *out, uint64_t state, unsigned first, unsigned count)
{
    unsigned middle = PAGE_WORDS / 2;
    unsigned random_words = first >= middle ? 0 : middle - first;

    if (random_words > count)
        random_words = count;
    fill_random(out, state, random_words);
    fill_tokens(out + random_words, mix64(state) | 1, count - random_words, 6);
}

void content_fill(uint64_t *out, enum content kind, uint64_t page, uint64_t stamp,
                  unsigned first, unsigned count)
{
    uint64_t identity = kind == CONTENT_DUPLICATE ? page % DUPLICATES : page;
    uint64_t state = mix64(seed ^ mix64(identity * 0x9e3779b97f4a7c15u + stamp)) | 1;

    switch (kind) {
    case CONTENT_ZERO:
        memset(out, 0, count * 8u);
        break;
    case CONTENT_RANDOM:
    case CONTENT_DUPLICATE:
        fill_random(out, state, count);
        break;
    case CONTENT_TEXT:
        fill_tokens(out, state, count, 10);
        break;
    case CONTENT_HALF:
        fill_half(out, state, first, count);
        break;
    case CONTENT_FILE:
        fill_file(out, page, first, count);
        break;
    case CONTENT_COUNTER:
        for (unsigned i = 0; i < count; i++)
            out[i] = (page << 32) + stamp + first + i;
        break;
    }
}
