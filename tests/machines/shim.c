/* Loaded before libc (LD_PRELOAD): counts what a process changes below one folder, and at a chosen
 * change kills the process, or answers an error as a full or failing disk does.
 *
 * The control block is a file that the test maps too. With FAULTS_SHADOW set, every fsync copies
 * what it makes durable into that folder, so that a power cut can be played: see power.py.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { IDLE = 0, COUNT = 1, KILL = 2, FAIL_ONE = 3, FAIL_FROM = 4, KILL_AFTER = 5 };

struct control {
    int32_t mode;    /* one of the above */
    int32_t at;      /* which change, counted from 1 */
    int32_t error;   /* errno of a failure */
    int32_t leader;  /* the process that a kill ends, 0 for the one that makes the change */
    int32_t seen;    /* changes counted since the test set it to 0 */
    int32_t struck;  /* how often the fault was played */
    int32_t no_sync; /* 1: fsync does nothing, the fault of a store that forgets it */
};

static struct control *control;
static char folder[PATH_MAX], shadow[PATH_MAX];
static size_t folder_length;
static pthread_mutex_t shadowing = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* Called when the process starts and, by a fork that gets a disk of its own, once more. */
__attribute__((constructor)) void watch(void) {
    const char *file = getenv("FAULTS_CONTROL"), *below = getenv("FAULTS_FOLDER");
    const char *copies = getenv("FAULTS_SHADOW");
    if (!file || !below || !realpath(below, folder)) return;
    folder_length = strlen(folder);
    if (copies && !realpath(copies, shadow)) return;
    int fd = open(file, O_RDWR | O_CLOEXEC);
    if (fd < 0) return;
    void *mapped = mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (mapped != MAP_FAILED) control = mapped;
}

static int below(const char *path) {
    return strncmp(path, folder, folder_length) == 0 &&
           (path[folder_length] == '/' || path[folder_length] == 0);
}

static int path_counts(int at, const char *path) {
    char full[PATH_MAX];
    if (!control || control->mode == IDLE || !path) return 0;
    if (path[0] == '/') return below(path);
    char link[64];
    if (at == AT_FDCWD) strcpy(link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", at);
    ssize_t n = readlink(link, full, sizeof full - 1);
    if (n <= 0) return 0;
    full[n] = 0;
    return below(full);
}

static int fd_counts(int fd) {
    char link[64], full[PATH_MAX];
    if (!control || control->mode == IDLE) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, full, sizeof full - 1);
    if (n <= 0) return 0;
    full[n] = 0;
    return below(full);
}

static void strike(void) {
    __sync_add_and_fetch(&control->struck, 1);
    kill(control->leader ? control->leader : getpid(), SIGKILL);
    if (control->leader) for (;;) pause();
    raise(SIGKILL);
}

/* 1 when the change must fail, with errno set. */
static int before(void) {
    int n = __sync_add_and_fetch(&control->seen, 1), mode = control->mode, at = control->at;
    if (mode == KILL && n == at) strike();
    if ((mode == FAIL_ONE && n == at) || (mode == FAIL_FROM && n >= at)) {
        __sync_add_and_fetch(&control->struck, 1);
        errno = control->error;
        return 1;
    }
    return 0;
}

static void after(void) {
    if (control->mode == KILL_AFTER && control->seen == control->at) strike();
}

#define CHANGE(counts, call) \
    do { \
        int counted = (counts); \
        if (counted && before()) return -1; \
        __typeof__(call) result = (call); \
        if (counted) after(); \
        return result; \
    } while (0)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    CHANGE(fd_counts(fd), real(fd, data, size));
}
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev);
    CHANGE(fd_counts(fd), real(fd, parts, count));
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    REAL(pwrite);
    CHANGE(fd_counts(fd), real(fd, data, size, at));
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    REAL(pwrite64);
    CHANGE(fd_counts(fd), real(fd, data, size, at));
}
int ftruncate(int fd, off_t size) {
    REAL(ftruncate);
    CHANGE(fd_counts(fd), real(fd, size));
}
int ftruncate64(int fd, off64_t size) {
    REAL(ftruncate64);
    CHANGE(fd_counts(fd), real(fd, size));
}
int rename(const char *from, const char *to) {
    REAL(rename);
    CHANGE(path_counts(AT_FDCWD, to), real(from, to));
}
int renameat(int from_at, const char *from, int to_at, const char *to) {
    REAL(renameat);
    CHANGE(path_counts(to_at, to), real(from_at, from, to_at, to));
}
int link(const char *from, const char *to) {
    REAL(link);
    CHANGE(path_counts(AT_FDCWD, to), real(from, to));
}
int linkat(int from_at, const char *from, int to_at, const char *to, int flags) {
    REAL(linkat);
    CHANGE(path_counts(to_at, to), real(from_at, from, to_at, to, flags));
}
int unlink(const char *path) {
    REAL(unlink);
    CHANGE(path_counts(AT_FDCWD, path), real(path));
}
int unlinkat(int at, const char *path, int flags) {
    REAL(unlinkat);
    CHANGE(path_counts(at, path), real(at, path, flags));
}
/* A new file or folder may have the inode number of one that is gone. */
static int made(int result, int at, const char *path) {
    struct stat found;
    char name[PATH_MAX + 64];
    if (result < 0 || !shadow[0]) return result;
    int known = path ? fstatat(at, path, &found, 0) : fstat(result, &found);
    if (known == 0 && (S_ISDIR(found.st_mode) || found.st_size == 0)) {
        snprintf(name, sizeof name, "%s/%lu.%c", shadow, (unsigned long)found.st_ino,
                 S_ISDIR(found.st_mode) ? 'd' : 'f');
        unlinkat(AT_FDCWD, name, 0);
    }
    return result;
}
int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    CHANGE(path_counts(AT_FDCWD, path), made(real(path, mode), AT_FDCWD, path));
}
int mkdirat(int at, const char *path, mode_t mode) {
    REAL(mkdirat);
    CHANGE(path_counts(at, path), made(real(at, path, mode), at, path));
}
int rmdir(const char *path) {
    REAL(rmdir);
    CHANGE(path_counts(AT_FDCWD, path), real(path));
}

#define OPENED(name, at, path, ...) \
    mode_t mode = 0; \
    if (flags & (O_CREAT | __O_TMPFILE)) { \
        va_list rest; \
        va_start(rest, flags); \
        mode = va_arg(rest, mode_t); \
        va_end(rest); \
    } \
    REAL(name); \
    int changes = (flags & (O_CREAT | O_TRUNC)) && path_counts(at, path); \
    CHANGE(changes, changes ? made(real(__VA_ARGS__, mode), 0, NULL) : real(__VA_ARGS__, mode))

int open(const char *path, int flags, ...) { OPENED(open, AT_FDCWD, path, path, flags); }
int open64(const char *path, int flags, ...) { OPENED(open64, AT_FDCWD, path, path, flags); }
int openat(int at, const char *path, int flags, ...) { OPENED(openat, at, path, at, path, flags); }
int openat64(int at, const char *path, int flags, ...) {
    OPENED(openat64, at, path, at, path, flags);
}

/* What an fsync of this file or folder makes durable, kept under its inode number. */
static void keep(int fd) {
    struct stat found;
    char name[PATH_MAX + 64], part[PATH_MAX + 80], data[1 << 16];
    if (!shadow[0] || fstat(fd, &found) != 0) return;
    pthread_mutex_lock(&shadowing);
    snprintf(name, sizeof name, "%s/%lu.%c", shadow, (unsigned long)found.st_ino,
             S_ISDIR(found.st_mode) ? 'd' : 'f');
    snprintf(part, sizeof part, "%s.%d", name, getpid());
    FILE *copy = fopen(part, "w");
    if (copy && S_ISDIR(found.st_mode)) {
        int again = openat(fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        DIR *listing = again < 0 ? NULL : fdopendir(again);
        struct dirent *entry;
        while (listing && (entry = readdir(listing)))
            if (strcmp(entry->d_name, ".") && strcmp(entry->d_name, ".."))
                fprintf(copy, "%lu %c %s\n", (unsigned long)entry->d_ino,
                        entry->d_type == DT_DIR ? 'd' : 'f', entry->d_name);
        if (listing) closedir(listing);
    } else if (copy) {
        /* Read by this very descriptor where it can be: closing another one of the same file would
         * take away the process's POSIX locks on it, by which SQLite knows who uses a database. */
        int readable = (fcntl(fd, F_GETFL) & O_ACCMODE) != O_WRONLY, again = fd;
        if (!readable) {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
            again = open(link, O_RDONLY | O_CLOEXEC);
        }
        off_t at = 0;
        ssize_t n;
        while (again >= 0 && (n = pread(again, data, sizeof data, at)) > 0) {
            fwrite(data, 1, n, copy);
            at += n;
        }
        if (!readable && again >= 0) close(again);
    }
    if (copy && fclose(copy) == 0) rename(part, name);
    pthread_mutex_unlock(&shadowing);
}

static int synced(int fd, int (*real)(int)) {
    int counted = fd_counts(fd);
    if (counted && before()) return -1;
    if (control && control->no_sync) return 0;
    int result = real(fd);
    if (result == 0 && counted) keep(fd);
    if (counted) after();
    return result;
}
int fsync(int fd) {
    REAL(fsync);
    return synced(fd, real);
}
int fdatasync(int fd) {
    REAL(fdatasync);
    return synced(fd, real);
}
