/* Pages of real files, read from a block device once and then checked by their sums. */
#ifndef DEVICE_PAGES_H
#define DEVICE_PAGES_H

#include <stdbool.h>
#include <stdint.h>

/*
 * Read the first `pages` pages of the device into `words` and remember a sum of each. The device's
 * pages are not kept anywhere else in the guest's memory (O_DIRECT).
 */
void device_pages_load(const char *path, uint64_t *words, uint64_t pages);

/* Whether the page is still what was read; says so on the console if not and `report`. */
bool device_page_ok(uint64_t page, unsigned long pass, bool report);

#endif
