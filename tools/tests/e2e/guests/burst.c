/* Native AIO on a file, as standard input says, one line for each order:
 *   w N    submits N writes of a block each, to places far apart; answers "ok"
 *   r N    the same with reads
 *   g      io_getevents until all that was submitted has ended; answers how many ended well
 * Nothing is collected without being told. Usage: burst FILE */
#define _GNU_SOURCE
#include <fcntl.h>
#include <libaio.h>
#include <stdio.h>
#include <stdlib.h>

enum { BLOCK = 4096, MOST = 64, APART = 3 };

int main(int count, char **words)
{
    static struct iocb requests[MOST], *batch[MOST];
    static struct io_event events[MOST];
    io_context_t context = 0;
    void *memory;
    if (count != 2 || io_setup(MOST, &context))
        return 2;
    int file = open(words[1], O_RDWR | O_DIRECT);
    if (file < 0 || posix_memalign(&memory, BLOCK, BLOCK * MOST))
        return 1;
    puts("ready");
    fflush(stdout);
    char line[64];
    int under_way = 0;
    while (fgets(line, sizeof line, stdin)) {
        int wanted = atoi(line + 1), good = 0;
        if (line[0] == 'g') {
            while (under_way) {
                int got = io_getevents(context, 1, MOST, events, NULL);
                if (got < 0)
                    return 1;
                for (int i = 0; i < got; i++)
                    good += events[i].res == BLOCK;
                under_way -= got;
            }
            printf("%d\n", good);
        } else {
            if (wanted < 1 || wanted > MOST - under_way)
                return 2;
            for (int i = 0; i < wanted; i++) {
                void *place = (char *)memory + BLOCK * i;
                long long at = (long long)BLOCK * APART * i;
                batch[i] = &requests[under_way + i];
                if (line[0] == 'w')
                    io_prep_pwrite(batch[i], file, place, BLOCK, at);
                else
                    io_prep_pread(batch[i], file, place, BLOCK, at);
            }
            if (io_submit(context, wanted, batch) != wanted)
                return 1;
            under_way += wanted;
            puts("ok");
        }
        fflush(stdout);
    }
    return 0;
}
