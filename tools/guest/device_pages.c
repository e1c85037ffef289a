#define _GNU_SOURCE
#include "device_pages.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "workload.h"

#define READ_PAGES 256u

static const uint64_t *device_words;
static uint64_t *sums;

/* Any single changed word changes it: each step is a bijection of the word and of the sum so far. */
static uint64_t page_sum(const uint64_t *words)
{
    uint64_t sum = 0;

    for (unsigned i = 0; i < PAGE_WORDS; i++) {
        sum = (sum ^ words[i]) * 0x9e3779b97f4a7c15u;
        sum ^= sum >> 29;
    }
    return sum;
}

static void fail(const char *path, uint64_t page)
{
    say("FATAL cannot read page %llu of %s: errno=%d\n", (unsigned long long)page, path, errno);
    _exit(1);
}

void device_pages_load(const char *path, uint64_t *words, uint64_t pages)
{
    int fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);

    sums = mmap(NULL, pages * sizeof(*sums), PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (fd < 0 || sums == MAP_FAILED)
        fail(path, 0);
    for (uint64_t page = 0; page < pages; page += READ_PAGES) {
        uint64_t count = pages - page < READ_PAGES ? pages - page : READ_PAGES;
        size_t bytes = count * PAGE_BYTES;

        if (pread(fd, words + page * PAGE_WORDS, bytes, (off_t)(page * PAGE_BYTES)) != (ssize_t)bytes)
            fail(path, page);
    }
    close(fd);
    for (uint64_t page = 0; page < pages; page++)
        sums[page] = page_sum(words + page * PAGE_WORDS);
    device_words = words;
}

bool device_page_ok(uint64_t page, unsigned long pass, bool report)
{
    bool ok = page_sum(device_words + page * PAGE_WORDS) == sums[page];

    if (!ok && report)
        say("CHECK %lu BAD device page=%llu\n", pass, (unsigned long long)page);
    return ok;
}
