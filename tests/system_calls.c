/* Stands between a process and its C library: whatever changes a directory is counted, and fails or kills as told.

   Compiled and preloaded by tests/faults.py. Nothing is watched before `watch_calls` has been called. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static char root[PATH_MAX];
static const char *failing = "";
static int log_to = -1, chosen, error;
static atomic_int calls;

/* Watch what is done below a directory; call number `number` and, of the kinds in `kinds`, all after it fail with
   `code`. With no code, the process dies before that call. Each call leaves a line in the file `log`. */
void watch_calls(const char *directory, int log, int number, int code, const char *kinds) {
    strncpy(root, directory, sizeof root - 1);
    log_to = log, chosen = number, error = code, failing = strdup(kinds);
}

static int fails(const char *name, char kind, const char *path) {
    size_t length = strlen(root);
    if (log_to < 0 || path == NULL || strncmp(path, root, length) || (path[length] && path[length] != '/')) return 0;
    int number = atomic_fetch_add(&calls, 1) + 1;
    char line[PATH_MAX + 32];
    int size = snprintf(line, sizeof line, "%c %s %s\n", kind, name, path[length] ? path + length + 1 : ".");
    syscall(SYS_write, log_to, line, size);
    if (number == chosen && !error) kill(getpid(), SIGKILL);
    if (!error || number < chosen || !strchr(failing, kind)) return 0;
    errno = error;
    return 1;
}

static int fails_at(const char *name, char kind, int handle) {
    if (log_to < 0) return 0;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return fails(name, kind, path);
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = va_arg(rest, mode_t); \
        va_end(rest); \
        return fails(#name, flags & O_CREAT ? 'c' : 'o', path) ? -1 : real(path, flags, mode); \
    }
#define OPENAT(name) \
    int name(int at, const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = va_arg(rest, mode_t); \
        va_end(rest); \
        return fails(#name, flags & O_CREAT ? 'c' : 'o', path) ? -1 : real(at, path, flags, mode); \
    }
#define BY_HANDLE(result, name, kind, parameters, ...) \
    result name parameters { \
        REAL(name); \
        return fails_at(#name, kind, handle) ? -1 : real(__VA_ARGS__); \
    }
#define BY_PATH(name, kind, parameters, ...) \
    int name parameters { \
        REAL(name); \
        return fails(#name, kind, path) ? -1 : real(__VA_ARGS__); \
    }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
BY_PATH(mkdir, 'n', (const char *path, mode_t mode), path, mode)
BY_PATH(rename, 'n', (const char *path, const char *to), path, to)
BY_PATH(unlink, 'u', (const char *path), path)
BY_PATH(rmdir, 'u', (const char *path), path)
BY_HANDLE(int, fsync, 's', (int handle), handle)
BY_HANDLE(int, fdatasync, 's', (int handle), handle)
BY_HANDLE(int, flock, 'l', (int handle, int how), handle, how)
BY_HANDLE(int, ftruncate, 'w', (int handle, off_t size), handle, size)
BY_HANDLE(int, ftruncate64, 'w', (int handle, off64_t size), handle, size)
BY_HANDLE(ssize_t, write, 'w', (int handle, const void *data, size_t size), handle, data, size)
BY_HANDLE(ssize_t, pwrite, 'w', (int handle, const void *data, size_t size, off_t at), handle, data, size, at)
BY_HANDLE(ssize_t, pwrite64, 'w', (int handle, const void *data, size_t size, off64_t at), handle, data, size, at)
