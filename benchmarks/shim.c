/* A file system that lacks something, or fails: preload it into a process that writes.

       gcc -shared -fPIC -o shim.so shim.c -ldl
       SHIM_UNDER=/dir SHIM_FAIL=pwrite:22,fsyncdir:22 LD_PRELOAD=./shim.so python train.py ...

   SHIM_FAIL lists CALL:ERRNO[:FIRST[:LAST]]; the FIRST-th to LAST-th calls fail (from the first, for
   ever). Only files below SHIM_UNDER are touched. Calls: pwrite, lseek, fallocate, fsync, fsyncdir,
   flock, rename, unlink, rmdir, opendir, write. With SHIM_TELL set, each failure is told. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

static long counts[16];

static int is_under(const char *path) {
    const char *under = getenv("SHIM_UNDER");
    return under && path && strncmp(path, under, strlen(under)) == 0;
}

static int is_fd_under(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return is_under(path);
}

static int is_at_under(int dir, const char *path) {
    return path && path[0] == '/' ? is_under(path) : dir == AT_FDCWD ? 0 : is_fd_under(dir);
}

/* Returns the error of this call, 0 if it may go on. */
static int failure(const char *call) {
    const char *at = getenv("SHIM_FAIL");
    for (int i = 0; at && *at && i < 16; i++) {
        size_t n = strcspn(at, ":");
        if (strlen(call) == n && strncmp(at, call, n) == 0) {
            int code = 0;
            long first = 1, last = LONG_MAX, number = __sync_add_and_fetch(&counts[i], 1);
            sscanf(at + n, ":%d:%ld:%ld", &code, &first, &last);
            if (number >= first && number <= last) {
                if (getenv("SHIM_TELL")) dprintf(2, "injected error %d in %s\n", code, call);
                return code;
            }
        }
        at += strcspn(at, ",");
        if (*at) at++;
    }
    return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL_IF(under, call) do { int code; \
    if ((under) && (code = failure(call))) { errno = code; return -1; } } while (0)

ssize_t pwrite(int fd, const void *data, size_t n, off_t at) {
    FAIL_IF(is_fd_under(fd), "pwrite");
    return REAL(pwrite)(fd, data, n, at);
}
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) {
    FAIL_IF(is_fd_under(fd), "pwrite");
    return REAL(pwrite64)(fd, data, n, at);
}
ssize_t write(int fd, const void *data, size_t n) {
    FAIL_IF(is_fd_under(fd), "write");
    return REAL(write)(fd, data, n);
}
/* Only files open for writing: reading anywhere is always possible. */
static int is_written(int fd) { return (fcntl(fd, F_GETFL) & O_ACCMODE) != O_RDONLY; }
off_t lseek(int fd, off_t at, int whence) {
    FAIL_IF(is_fd_under(fd) && is_written(fd), "lseek");
    return REAL(lseek)(fd, at, whence);
}
off64_t lseek64(int fd, off64_t at, int whence) {
    FAIL_IF(is_fd_under(fd) && is_written(fd), "lseek");
    return REAL(lseek64)(fd, at, whence);
}
int posix_fallocate(int fd, off_t at, off_t n) {
    int code = is_fd_under(fd) ? failure("fallocate") : 0;
    return code ? code : REAL(posix_fallocate)(fd, at, n);
}
int posix_fallocate64(int fd, off64_t at, off64_t n) {
    int code = is_fd_under(fd) ? failure("fallocate") : 0;
    return code ? code : REAL(posix_fallocate64)(fd, at, n);
}
int fsync(int fd) {
    struct stat status;
    int is_dir = fstat(fd, &status) == 0 && S_ISDIR(status.st_mode);
    FAIL_IF(is_fd_under(fd), is_dir ? "fsyncdir" : "fsync");
    return REAL(fsync)(fd);
}
int flock(int fd, int operation) {
    FAIL_IF(is_fd_under(fd), "flock");
    return REAL(flock)(fd, operation);
}
int rename(const char *from, const char *to) {
    FAIL_IF(is_under(to), "rename");
    return REAL(rename)(from, to);
}
int unlink(const char *path) {
    FAIL_IF(is_under(path), "unlink");
    return REAL(unlink)(path);
}
int unlinkat(int dir, const char *path, int flags) {
    FAIL_IF(is_at_under(dir, path), flags & AT_REMOVEDIR ? "rmdir" : "unlink");
    return REAL(unlinkat)(dir, path, flags);
}
int rmdir(const char *path) {
    FAIL_IF(is_under(path), "rmdir");
    return REAL(rmdir)(path);
}
DIR *opendir(const char *path) {
    int code = is_under(path) ? failure("opendir") : 0;
    if (code) { errno = code; return NULL; }
    return REAL(opendir)(path);
}
