// Bytes on the C heap of a process and their peak, over all its threads. Preloaded, it stands before glibc's allocator:
//
//     every malloc, calloc, realloc, memalign ...   now += usable size of the block, peak = max(peak, now)
//     every free                                    now -= usable size of the block
//
// torch's CPU allocator asks posix_memalign, operator new asks malloc, and blocks that glibc maps rather than cuts from
// an arena come through here as well. What a program maps by itself (thread stacks, Python's arenas) does not.
#define _GNU_SOURCE
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>
#include <unistd.h>

extern void *__libc_malloc(size_t);
extern void __libc_free(void *);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

static atomic_long now, peak;

static void add(long bytes) {
    long held = atomic_fetch_add_explicit(&now, bytes, memory_order_relaxed) + bytes;
    long high = atomic_load_explicit(&peak, memory_order_relaxed);
    while (held > high && !atomic_compare_exchange_weak(&peak, &high, held)) {
    }
}

static void *counted(void *block) {
    if (block) add((long)malloc_usable_size(block));
    return block;
}

void *malloc(size_t size) { return counted(__libc_malloc(size)); }

void *calloc(size_t count, size_t size) { return counted(__libc_calloc(count, size)); }

void free(void *block) {
    if (!block) return;
    // before the block goes: another thread may have its memory right after
    atomic_fetch_sub_explicit(&now, (long)malloc_usable_size(block), memory_order_relaxed);
    __libc_free(block);
}

void *realloc(void *block, size_t size) {
    long before = block ? (long)malloc_usable_size(block) : 0;
    void *moved = __libc_realloc(block, size);
    if (moved)
        add((long)malloc_usable_size(moved) - before);
    else if (!size)  // glibc frees the block then; of a failure it is left as it was
        add(-before);
    return moved;
}

void *reallocarray(void *block, size_t count, size_t size) {
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes)) {
        errno = ENOMEM;
        return NULL;
    }
    return realloc(block, bytes);
}

void *memalign(size_t alignment, size_t size) { return counted(__libc_memalign(alignment, size)); }

void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void **out, size_t alignment, size_t size) {
    if (alignment % sizeof(void *) || !alignment || alignment & (alignment - 1)) return EINVAL;
    int before = errno;  // which it must leave alone
    void *block = memalign(alignment, size);
    errno = before;
    if (!block) return ENOMEM;
    *out = block;
    return 0;
}

void *valloc(size_t size) { return memalign((size_t)getpagesize(), size); }

void *pvalloc(size_t size) {
    size_t page = (size_t)getpagesize();
    return memalign(page, (size + page - 1) / page * page);
}

void heapmeter_reset(void) { atomic_store(&peak, atomic_load(&now)); }
long heapmeter_now(void) { return atomic_load(&now); }
long heapmeter_peak(void) { return atomic_load(&peak); }
