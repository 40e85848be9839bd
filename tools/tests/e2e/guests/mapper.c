/*
 * A guest that stores through a shared mapping, and a checker of what it stored.
 *
 *   mapper store FILE SIGN   stores, makes it durable, makes the file SIGN, waits to be killed
 *   mapper check FILE
 *
 * Of FILE's 64 blocks every second one is stored to. The first half is made durable by msync, the
 * second by fsync.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define BLOCK 4096
#define BLOCKS 64

static int die(const char *what)
{
	perror(what);
	return 2;
}

int main(int count, char **words)
{
	int file = count < 3 ? -1 : open(words[2], O_RDWR);
	if (file < 0 || ftruncate(file, BLOCKS * BLOCK))
		return die("open");
	char *map = mmap(NULL, BLOCKS * BLOCK, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	if (map == MAP_FAILED)
		return die("mmap");
	if (!strcmp(words[1], "check")) {
		int wrong = 0;
		for (int block = 0; block < BLOCKS; block++)
			for (int at = 0; at < BLOCK; at++)
				wrong += map[block * BLOCK + at] != (block % 2 ? block : 0);
		printf("%d bytes are wrong\n", wrong);
		return wrong > 0;
	}
	for (int block = 1; block < BLOCKS / 2; block += 2)
		memset(map + block * BLOCK, block, BLOCK);
	if (msync(map, BLOCKS / 2 * BLOCK, MS_SYNC))
		return die("msync");
	for (int block = BLOCKS / 2 + 1; block < BLOCKS; block += 2)
		memset(map + block * BLOCK, block, BLOCK);
	if (fsync(file))
		return die("fsync");
	int sign = open(words[3], O_CREAT | O_WRONLY, 0600);
	if (sign < 0)
		return die("sign");
	for (;;)
		pause();
}
