/* Does what standard input says to a file, one line for each order:
 *   w BLOCK VALUE   fills a block with a value and answers "ok"
 *   r BLOCK         answers the value that fills a block, or "mixed"
 *   s               fsync
 *   t SIZE          ftruncate
 *   z               answers the file's size
 *   c SECONDS       sets the file's times
 *   m               answers when the content was changed last, in seconds
 *   l, u            takes and drops a write lock on the file's first byte
 * A call that fails answers its errno's number. Usage: serve FILE rw|ro */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BLOCK = 4096 };

static void answer(long failed, const char *text)
{
    if (failed)
        printf("%d\n", errno);
    else
        puts(text);
    fflush(stdout);
}

int main(int count, char **words)
{
    if (count != 3)
        return 2;
    int writes = strcmp(words[2], "rw") == 0;
    int file = open(words[1], writes ? O_RDWR : O_RDONLY);
    answer(file < 0, "ready");
    if (file < 0)
        return 1;
    static unsigned char bytes[BLOCK];
    char line[128], text[32];
    while (fgets(line, sizeof line, stdin)) {
        long block = 0;
        int value = 0;
        struct stat stat;
        struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_len = 1 };
        switch (line[0]) {
        case 'w':
            sscanf(line + 1, "%ld %d", &block, &value);
            memset(bytes, value, BLOCK);
            answer(pwrite(file, bytes, BLOCK, block * BLOCK) != BLOCK, "ok");
            break;
        case 'r':
            sscanf(line + 1, "%ld", &block);
            if (pread(file, bytes, BLOCK, block * BLOCK) != BLOCK) {
                answer(1, "");
                break;
            }
            snprintf(text, sizeof text, "%d", bytes[0]);
            answer(0, memcmp(bytes, bytes + 1, BLOCK - 1) ? "mixed" : text);
            break;
        case 'c': {
            struct timespec times[2] = {{0}};
            sscanf(line + 1, "%ld", &times[0].tv_sec);
            times[1] = times[0];
            answer(futimens(file, times), "ok");
            break;
        }
        case 'm':
            if (fstat(file, &stat)) {
                answer(1, "");
                break;
            }
            snprintf(text, sizeof text, "%ld", (long)stat.st_mtime);
            answer(0, text);
            break;
        case 's':
            answer(fsync(file), "ok");
            break;
        case 't':
            sscanf(line + 1, "%ld", &block);
            answer(ftruncate(file, block), "ok");
            break;
        case 'z':
            if (fstat(file, &stat)) {
                answer(1, "");
                break;
            }
            snprintf(text, sizeof text, "%lld", (long long)stat.st_size);
            answer(0, text);
            break;
        case 'u':
            lock.l_type = F_UNLCK;
            /* fallthrough */
        case 'l':
            answer(fcntl(file, F_SETLK, &lock), "ok");
            break;
        default:
            return 2;
        }
    }
    return 0;
}
