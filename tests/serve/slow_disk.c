/* A slow disk, for LD_PRELOAD: files below a folder called "slow", and every fsync, wait until the file SLOW_UNTIL is there. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void wait_for_disk(void) {
    while (access(getenv("SLOW_UNTIL"), F_OK)) usleep(20000);
}

#define OPEN(name)                                                                            \
    int name(const char *path, int flags, ...) {                                              \
        va_list more;                                                                         \
        va_start(more, flags);                                                                \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0;             \
        va_end(more);                                                                         \
        if (strstr(path, "/slow/") && strstr(path, ".safetensors")) wait_for_disk();          \
        return ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name))(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

int fsync(int file) {
    wait_for_disk();
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(file);
}
