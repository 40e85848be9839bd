/*
 * Reads and writes whose memory ends before they do. Prints a line for every observation; the same
 * program must print the same lines on an ordinary file on ext4 and on a protected file.
 *
 * Usage: faulting PATH. The file exists; its content and size do not matter.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "observe.h"

#define ROOM (2 << 20)
#define SIZE (100 << 10)

static const char *path;
static char *end;     /* where memory ends: a page without access follows */
static char *content; /* of the file */
static char *all;     /* room for the whole file */

/* The whole file: its size and content. */
static void see_file(const char *what)
{
	int fd = open(path, O_RDONLY);
	off_t size = lseek(fd, 0, SEEK_END);
		ssize_t got = pread(fd, all, 1 << 19, 0);
	unsigned sum = 17;
	for (ssize_t i = 0; i < got; i++)
		sum = sum * 31 + (unsigned char)all[i];
	close(fd);
	printf("  %s: size %ld, content %08x\n", what, (long)size, sum);
}

static int begin(int flags)
{
	int fd = open(path, O_RDWR | O_TRUNC);
	pwrite(fd, content, SIZE, 0);
	if (flags & O_DIRECT)
		fsync(fd);
	close(fd);
	fd = open(path, O_RDWR | flags);
	for (int i = ROOM - (1 << 18); i < ROOM; i++)
		end[i - ROOM] = (char)(i * 13 + i / 255);
	return fd;
}

enum way { PWRITE, WRITE, PWRITEV, APPEND, PREAD, READ, PREADV, WAYS };
static const char *names[] = {"pwrite", "write", "pwritev", "append", "pread", "read", "preadv"};

static void one(enum way way, int direct, long offset, long reach, long length)
{
	int fd = begin(direct | (way == APPEND ? O_APPEND : 0));
	char *from = end - reach;
	char what[128];
	/* In two pieces, the first half of what is there. */
	long first = reach / 2 / 512 * 512;
	struct iovec pieces[2] = {{from, first}, {from + first, length - first}};
	long result = -2;
	snprintf(what, sizeof what, "%s%s of %ld at %ld, memory for %ld",
		 direct ? "direct " : "", names[way], length, offset, reach);
	lseek(fd, offset, SEEK_SET);
	errno = 0;
	switch (way) {
	case PWRITE: result = pwrite(fd, from, length, offset); break;
	case APPEND:
	case WRITE: result = write(fd, from, length); break;
	case PWRITEV: result = pwritev(fd, pieces, 2, offset); break;
	case PREAD: result = pread(fd, from, length, offset); break;
	case READ: result = read(fd, from, length); break;
	case PREADV: result = preadv(fd, pieces, 2, offset); break;
	default: break;
	}
	see(what, result);
	see("  position", lseek(fd, 0, SEEK_CUR));
	close(fd);
	if (way < PREAD) {
		see_file("file");
	} else {
		long moved = result > 0 ? result : 0;
		see("  as in the file", memcmp(from, content + offset, moved) == 0);
	}
}

int main(int argc, char **argv)
{
	path = argv[1];
	int held = open(path, O_RDONLY);
	char *memory = mmap(NULL, 2 * ROOM, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	end = memory + ROOM;
	mprotect(end, 4096, PROT_NONE); /* What follows must not be touched. */
	memset(end + 4096, 7, ROOM - 4096);
	content = malloc(ROOM), all = malloc(ROOM);
	for (int i = 0; i < ROOM; i++)
		content[i] = (char)(i * 7 + i / 251);
	static const long offsets[] = {100, 4096, SIZE - 4096, SIZE, SIZE + 6000};
	static const long reaches[] = {0, 1, 5000, 70000};
	static const long lengths[] = {4096, 65536, 1 << 18};
	for (enum way way = 0; way < WAYS; way++)
		for (unsigned o = 0; o < sizeof offsets / sizeof *offsets; o++)
			for (unsigned r = 0; r < sizeof reaches / sizeof *reaches; r++)
				for (unsigned l = 0; l < sizeof lengths / sizeof *lengths; l++)
					/* Linux lets a file end where a write of nothing began. */
					if (reaches[r] < lengths[l] && (reaches[r] || offsets[o] <= SIZE))
						one(way, 0, offsets[o], reaches[r], lengths[l]);
	/* O_DIRECT: aligned places, where the memory ends at a page. */
	static const long sectors[] = {512, 8192, SIZE - 4096, SIZE};
	static const long there[] = {0, 512, 12288, 69632};
	for (enum way way = 0; way < WAYS; way++)
		for (unsigned o = 0; o < sizeof sectors / sizeof *sectors; o++)
			for (unsigned r = 0; r < sizeof there / sizeof *there; r++)
				for (long length = 4096; length <= 1 << 17; length *= 4)
					/* Less than a block makes ext4's file longer all the same. */
					if (there[r] < length &&
					    (there[r] != 512 || (sectors[o] < SIZE && way != APPEND)))
						one(way, O_DIRECT, sectors[o], there[r], length);
	long touched = 0;
	for (long i = 4096; i < ROOM; i++)
		touched += end[i] != 7;
	see("touched behind the gap", touched);
	close(held);
	puts("done");
	return 0;
}
