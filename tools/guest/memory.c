/*
 * Static memory, pages read from a device, and the writable working set; the thread that dirties
 * the latter, and the thread that checks them all.
 *
 * Every page can be regenerated: a static page from its number, a working-set page from its number
 * and its generation (how often it was written). Write g of a page goes to its slot (g - 1) mod
 * slots; so the last stamp of every slot follows from the generation alone. Generations are kept
 * outside the pages, twice: a page that arrives in an older version than the table says is found.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#include "device_pages.h"
#include "workload.h"

#define LOCKS 64u
#define WRITE_TICK_NS 4000000ull
#define CHECK_TICK_NS 20000000ull
#define MOST_BACKLOG_NS 250000000ull
#define DIRTY_LINE_NS 100000000ull /* often: a migration may take less than a second */
#define BAD_LINES_PER_PASS 16u
#define OLDEST_AGE 32u
#define RESERVE_BYTES (6ull << 20) /* for the kernel and our threads */

static const struct params *params;
static uint64_t *static_words, *device_words, *wws_words;
static uint64_t static_pages, device_pages, wws_pages;
static uint32_t *generation, *generation_inverse;
static unsigned slot_words, slots;
static pthread_mutex_t locks[LOCKS];

static void *allocate(uint64_t bytes)
{
    void *memory = mmap(NULL, bytes ? bytes : PAGE_BYTES, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);

    if (memory == MAP_FAILED) {
        say("FATAL out of memory\n");
        _exit(1);
    }
    return memory;
}

/* The kernel would panic for want of memory before this program could say why. */
static void require_free(uint64_t bytes)
{
    struct sysinfo info;
    uint64_t free_bytes;

    if (sysinfo(&info) != 0)
        return;
    free_bytes = (uint64_t)info.freeram * info.mem_unit;
    if (free_bytes < bytes + RESERVE_BYTES) {
        say("FATAL not enough memory: %llu MiB free, %llu MiB needed\n",
            (unsigned long long)free_bytes >> 20, (unsigned long long)(bytes + RESERVE_BYTES) >> 20);
        _exit(1);
    }
}

static enum content static_kind(uint64_t page)
{
    const unsigned long shares[] = {params->random, params->text, params->zero,
                                    params->file, params->half, params->duplicate};
    static const enum content kinds[] = {CONTENT_RANDOM, CONTENT_TEXT, CONTENT_ZERO,
                                         CONTENT_FILE, CONTENT_HALF, CONTENT_DUPLICATE};
    unsigned long draw = mix64(page ^ params->seed) % 100, sum = 0;

    for (unsigned i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
        sum += shares[i];
        if (draw < sum)
            return kinds[i];
    }
    return CONTENT_ZERO; /* shares below 100 percent: the rest is zero */
}

static void static_fill(uint64_t *out, uint64_t page)
{
    content_fill(out, static_kind(page), page, 0, 0, PAGE_WORDS);
}

static void wws_fill(uint64_t *out, uint64_t page, uint64_t written)
{
    for (unsigned slot = 0; slot < slots; slot++) {
        uint64_t stamp = written > slot ? written - (written - 1 - slot) % slots : 0;

        content_fill(out + slot * slot_words, params->rewrite, static_pages + page, stamp,
                     slot * slot_words, slot_words);
    }
}

void memory_setup(const struct params *p)
{
    params = p;
    static_pages = ((uint64_t)p->static_mib << 20) / PAGE_BYTES;
    wws_pages = ((uint64_t)p->wws_mib << 20) / PAGE_BYTES;
    slot_words = (unsigned)p->touch / 8u;
    slots = PAGE_WORDS / slot_words;
    device_pages = ((uint64_t)p->device_mib << 20) / PAGE_BYTES;
    require_free((static_pages + device_pages + wws_pages) * PAGE_BYTES);
    static_words = allocate(static_pages * PAGE_BYTES);
    device_words = allocate(device_pages * PAGE_BYTES);
    wws_words = allocate(wws_pages * PAGE_BYTES);
    generation = allocate(wws_pages * sizeof(*generation));
    generation_inverse = allocate(wws_pages * sizeof(*generation_inverse));
    for (unsigned i = 0; i < LOCKS; i++)
        pthread_mutex_init(&locks[i], NULL);
    for (uint64_t page = 0; page < static_pages; page++)
        static_fill(static_words + page * PAGE_WORDS, page);
    for (uint64_t page = 0; page < wws_pages; page++) {
        wws_fill(wws_words + page * PAGE_WORDS, page, 0);
        generation_inverse[page] = ~0u;
    }
    if (device_pages > 0)
        device_pages_load(p->device, device_words, device_pages);
}

static void write_page(uint64_t page)
{
    pthread_mutex_t *lock = &locks[page % LOCKS];
    uint32_t stamp;
    unsigned first;

    pthread_mutex_lock(lock);
    stamp = generation[page] + 1;
    first = (stamp - 1) % slots * slot_words;
    content_fill(wws_words + page * PAGE_WORDS + first, params->rewrite, static_pages + page,
                 stamp, first, slot_words);
    generation[page] = stamp;
    generation_inverse[page] = ~stamp;
    pthread_mutex_unlock(lock);
}

/* Keeps the rate over any stretch longer than a tick; a backlog older than 250 ms is dropped. */
static void *dirty_forever(void *unused)
{
    uint64_t start = now_ns(), tick = start, last_line = start, cursor = 0;
    uint64_t draw = params->seed | 1, written = 0, dropped = 0;
    uint64_t most_backlog = params->rate * MOST_BACKLOG_NS / NS_PER_S + 1;

    (void)unused;
    for (;;) {
        uint64_t due = (uint64_t)((unsigned __int128)(now_ns() - start) * params->rate / NS_PER_S);

        if (due - written - dropped > most_backlog)
            dropped = due - written - most_backlog;
        while (written + dropped < due) {
            uint64_t page = params->sequential ? cursor++ : xorshift64(&draw) >> 11;

            write_page(page % wws_pages);
            written++;
        }
        if (now_ns() - last_line >= DIRTY_LINE_NS) {
            last_line = now_ns();
            say("DIRTY %llu %llu\n", (unsigned long long)written, (unsigned long long)dropped);
        }
        tick += WRITE_TICK_NS;
        if (tick < now_ns())
            tick = now_ns() + WRITE_TICK_NS / 4;
        sleep_until_ns(tick);
    }
    return NULL;
}

/* Offset of the first byte that differs, or -1. */
static long first_difference(const uint64_t *found, const uint64_t *expected)
{
    if (memcmp(found, expected, PAGE_BYTES) == 0)
        return -1;
    for (long i = 0; i < (long)PAGE_BYTES; i++)
        if (((const uint8_t *)found)[i] != ((const uint8_t *)expected)[i])
            return i;
    return -1;
}

/* How many writes a bad working-set page is behind, or -1 if it is no older version either. */
static long stale_by(const uint64_t *found, uint64_t page, uint64_t written)
{
    uint64_t scratch[PAGE_WORDS];

    for (uint64_t age = 1; age <= OLDEST_AGE && age <= written; age++) {
        wws_fill(scratch, page, written - age);
        if (memcmp(found, scratch, PAGE_BYTES) == 0)
            return (long)age;
    }
    return -1;
}

static bool static_page_ok(uint64_t page, unsigned long pass, bool report)
{
    uint64_t expected[PAGE_WORDS];
    long offset;

    static_fill(expected, page);
    offset = first_difference(static_words + page * PAGE_WORDS, expected);
    if (offset >= 0 && report)
        say("CHECK %lu BAD static page=%llu off=%ld kind=%d\n", pass, (unsigned long long)page,
            offset, (int)static_kind(page));
    return offset < 0;
}

static bool wws_page_ok(uint64_t page, unsigned long pass, bool report)
{
    pthread_mutex_t *lock = &locks[page % LOCKS];
    uint64_t expected[PAGE_WORDS];
    const uint64_t *found = wws_words + page * PAGE_WORDS;
    bool table_ok;
    uint32_t written;
    long offset, age = -1;

    pthread_mutex_lock(lock);
    written = generation[page];
    table_ok = written == ~generation_inverse[page];
    wws_fill(expected, page, written);
    offset = first_difference(found, expected);
    if (offset >= 0)
        age = stale_by(found, page, written);
    pthread_mutex_unlock(lock);
    if (report && offset >= 0)
        say("CHECK %lu BAD wws page=%llu off=%ld writes=%u stale_by=%ld\n", pass,
            (unsigned long long)page, offset, written, age);
    else if (report && !table_ok)
        say("CHECK %lu BAD table page=%llu off=0 writes=%u\n", pass, (unsigned long long)page,
            written);
    return offset < 0 && table_ok;
}

static bool page_ok(uint64_t page, unsigned long pass, bool report)
{
    if (page < static_pages)
        return static_page_ok(page, pass, report);
    page -= static_pages;
    if (page < wws_pages)
        return wws_page_ok(page, pass, report);
    return device_page_ok(page - wws_pages, pass, report);
}

static void *check_forever(void *unused)
{
    uint64_t total = static_pages + wws_pages + device_pages, tick = now_ns();
    uint64_t per_tick = params->check_rate * CHECK_TICK_NS / NS_PER_S + 1;

    (void)unused;
    for (unsigned long pass = 1;; pass++) {
        uint64_t bad = 0;

        for (uint64_t i = 0; i < total; i++) {
            if (!page_ok(i, pass, bad < BAD_LINES_PER_PASS))
                bad++;
            if (i % per_tick == per_tick - 1) {
                tick += CHECK_TICK_NS;
                if (tick < now_ns()) /* never faster than one batch per tick: no catching up */
                    tick = now_ns() + CHECK_TICK_NS / 4;
                sleep_until_ns(tick);
            }
        }
        if (bad == 0)
            say("CHECK %lu ok %llu\n", pass, (unsigned long long)total);
        else
            say("CHECK %lu failed %llu of %llu\n", pass, (unsigned long long)bad,
                (unsigned long long)total);
    }
    return NULL;
}

void memory_start(void)
{
    if (params->rate > 0 && wws_pages > 0)
        start_thread(dirty_forever, false);
    if (params->selfcheck && static_pages + wws_pages + device_pages > 0)
        start_thread(check_forever, false);
}
