/* Makes chosen file operations below one folder fail, as a full, broken or read-only disk does. For LD_PRELOAD.
 *
 * Every operation below the folder that `faults_watch` names gets a number, from 0. `faults_arm` chooses the one that
 * fails, what it fails with, and whether later ones of the same kinds do too. Error 0: half of it is done, and said so.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdio_ext.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { OPEN_READ, OPEN_WRITE, READ, WRITE, STREAM, SYNC, RENAME, MKDIR, UNLINK, TRUNCATE };
enum fate { AS_USUAL, HALF, FAILS };
enum { NOTED = 1 << 16 };

static char folder[PATH_MAX];
static size_t length; /* 0: nothing is watched */
static unsigned char kinds[NOTED];
static long count, struck, chosen;
static int error, stays;
static unsigned affected; /* bits of kinds */

void faults_watch(const char *path)
{
    length = strlen(path);
    memcpy(folder, path, length + 1);
    count = struck = 0;
    affected = 0;
}

void faults_arm(long number, int with, int and_later, unsigned of_kinds)
{
    count = struck = 0;
    chosen = number, error = with, stays = and_later, affected = of_kinds;
}

long faults_count(void) { return count; }
long faults_struck(void) { return struck; }
const unsigned char *faults_kinds(void) { return kinds; }

static enum fate fate(enum kind kind)
{
    long number = __atomic_fetch_add(&count, 1, __ATOMIC_RELAXED);
    if (number < NOTED)
        kinds[number] = kind;
    if (!(affected >> kind & 1) || (stays ? number < chosen : number != chosen))
        return AS_USUAL;
    struck++;
    errno = error;
    return error ? FAILS : HALF;
}

static int below(const char *path)
{
    return !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static int place_of(int file, char *path)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t n = readlink(link, path, PATH_MAX - 1);
    path[n < 0 ? 0 : n] = 0;
    return n > 0;
}

static int watches_file(int file)
{
    char path[PATH_MAX];
    int before = errno, found = length && place_of(file, path) && below(path);
    errno = before;
    return found;
}

static int watches(int directory, const char *path)
{
    char whole[2 * PATH_MAX];
    if (!length || !path)
        return 0;
    if (path[0] == '/')
        return below(path);
    if (directory == AT_FDCWD ? !getcwd(whole, PATH_MAX) : !place_of(directory, whole))
        return 0;
    strcat(whole, "/");
    return below(strncat(whole, path, PATH_MAX));
}

static enum fate of_file(int file, enum kind kind) { return watches_file(file) ? fate(kind) : AS_USUAL; }
static int fails(int directory, const char *path, enum kind kind) { return watches(directory, path) && fate(kind) == FAILS; }
static enum kind opening(int flags) { return (flags & O_ACCMODE) == O_RDONLY ? OPEN_READ : OPEN_WRITE; }

#define REAL(name)                                           \
    __extension__({                                          \
        static __typeof__(&name) found;                      \
        if (!found)                                          \
            *(void **)&found = dlsym(RTLD_NEXT, #name);      \
        found;                                               \
    })

#define MODE                                                 \
    va_list more;                                            \
    va_start(more, flags);                                   \
    mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0; \
    va_end(more);

#define OPEN(name)                                                                              \
    int name(const char *path, int flags, ...)                                                  \
    {                                                                                           \
        MODE return fails(AT_FDCWD, path, opening(flags)) ? -1 : REAL(name)(path, flags, mode); \
    }
#define OPENAT(name)                                                                                          \
    int name(int directory, const char *path, int flags, ...)                                                 \
    {                                                                                                         \
        MODE return fails(directory, path, opening(flags)) ? -1 : REAL(name)(directory, path, flags, mode);   \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

#define TRANSFER(name, kind, parameters, arguments)                              \
    ssize_t name parameters                                                      \
    {                                                                            \
        enum fate it = of_file(file, kind);                                      \
        if (it == HALF && size > 1)                                              \
            size /= 2;                                                           \
        return it == FAILS ? -1 : REAL(name) arguments;                          \
    }
TRANSFER(read, READ, (int file, void *buffer, size_t size), (file, buffer, size))
TRANSFER(write, WRITE, (int file, const void *buffer, size_t size), (file, buffer, size))
TRANSFER(pread64, READ, (int file, void *buffer, size_t size, off64_t at), (file, buffer, size, at))
TRANSFER(pwrite64, WRITE, (int file, const void *buffer, size_t size, off64_t at), (file, buffer, size, at))

ssize_t writev(int file, const struct iovec *parts, int n)
{
    enum fate it = of_file(file, WRITE);
    if (it == HALF && n > 0 && parts[0].iov_len > 1)
        return REAL(write)(file, parts[0].iov_base, parts[0].iov_len / 2);
    return it == FAILS ? -1 : REAL(writev)(file, parts, n);
}

/* A stream that cannot be flushed loses what it holds, and says so only in the result of fclose. */
size_t fwrite(const void *data, size_t size, size_t n, FILE *stream)
{
    return of_file(fileno(stream), STREAM) == FAILS ? 0 : REAL(fwrite)(data, size, n, stream);
}

int fclose(FILE *stream)
{
    int lost = of_file(fileno(stream), STREAM) == FAILS;
    if (lost)
        __fpurge(stream);
    int result = REAL(fclose)(stream);
    if (lost)
        errno = error;
    return lost ? EOF : result;
}

int fsync(int file) { return of_file(file, SYNC) == FAILS ? -1 : REAL(fsync)(file); }
int fdatasync(int file) { return of_file(file, SYNC) == FAILS ? -1 : REAL(fdatasync)(file); }
int ftruncate64(int file, off64_t size) { return of_file(file, TRUNCATE) == FAILS ? -1 : REAL(ftruncate64)(file, size); }

int truncate64(const char *path, off64_t size)
{
    return fails(AT_FDCWD, path, TRUNCATE) ? -1 : REAL(truncate64)(path, size);
}

int rename(const char *from, const char *to)
{
    return fails(AT_FDCWD, to, RENAME) ? -1 : REAL(rename)(from, to);
}

int mkdir(const char *path, mode_t mode) { return fails(AT_FDCWD, path, MKDIR) ? -1 : REAL(mkdir)(path, mode); }
int unlink(const char *path) { return fails(AT_FDCWD, path, UNLINK) ? -1 : REAL(unlink)(path); }
int rmdir(const char *path) { return fails(AT_FDCWD, path, UNLINK) ? -1 : REAL(rmdir)(path); }

int unlinkat(int directory, const char *path, int flags)
{
    return fails(directory, path, UNLINK) ? -1 : REAL(unlinkat)(directory, path, flags);
}

DIR *opendir(const char *path) { return fails(AT_FDCWD, path, OPEN_READ) ? NULL : REAL(opendir)(path); }
