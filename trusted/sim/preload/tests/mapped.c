/*
 * Shared mappings of one path: what stores, loads, reads, writes, sizes, forks and the calls on
 * mappings show of each other. Prints a line for every observation; the same program must print the
 * same lines on an ordinary file on ext4 and on a protected file.
 *
 * Usage: mapped PATH. The file exists; its content and size do not matter.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <libaio.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "observe.h"
#include "touch.h"

#define BLOCK 4096
#define RW (PROT_READ | PROT_WRITE)

static const char *path;
static char seen[1 << 20] __attribute__((aligned(BLOCK)));

static int fresh(long size)
{
	int fd = open(path, O_RDWR | O_TRUNC);
	for (long at = 0; at < size; at++)
		seen[at] = (char)(at * 13 + at / BLOCK + 1);
	if (size)
		see("fresh", pwrite(fd, seen, size, 0));
	return fd;
}

static unsigned sum(const volatile char *bytes, long length)
{
	unsigned sum = 1;
	for (long at = 0; at < length; at++)
		sum = sum * 31 + (unsigned char)bytes[at];
	return sum;
}

/* What a new open file reads of the whole. */
static void content(const char *what)
{
	int fd = open(path, O_RDONLY);
	memset(seen, 0, sizeof seen);
	long length = pread(fd, seen, sizeof seen, 0);
	printf("%s: %ld bytes, %08x\n", what, length, sum(seen, length));
	fflush(stdout);
	close(fd);
}

static void wait_for(pid_t child)
{
	int status;
	waitpid(child, &status, 0);
	if (WIFSIGNALED(status))
		see("killed", WTERMSIG(status));
	else
		see("exit", WEXITSTATUS(status));
}

static void refusals(void)
{
	int fd = fresh(3 * BLOCK), reader = open(path, O_RDONLY), writer = open(path, O_WRONLY);
	MAP(NULL, 0, RW, MAP_SHARED, fd, 0);
	MAP(NULL, BLOCK, RW, MAP_SHARED, fd, 100);
	MAP(NULL, BLOCK, RW, MAP_SHARED, fd, -BLOCK);
	MAP(NULL, BLOCK, RW, MAP_SHARED, reader, 0);
	MAP(NULL, BLOCK, RW, MAP_SHARED, writer, 0);
	MAP(NULL, BLOCK, PROT_READ, MAP_SHARED, writer, 0);
	MAP(NULL, SIZE_MAX - 100, RW, MAP_SHARED, fd, 0);
	MAP((void *)100, BLOCK, RW, MAP_SHARED | MAP_FIXED, fd, 0);
	MAP((void *)&seen, BLOCK, RW, MAP_SHARED | MAP_FIXED_NOREPLACE, fd, 0);
	MAP(NULL, BLOCK, RW, MAP_SHARED_VALIDATE, fd, 0);
	MAP(NULL, BLOCK, RW, 0, fd, 0);
	char *map = mmap(NULL, 3 * BLOCK, PROT_READ, MAP_SHARED, reader, 0);
	SEE(mprotect(map, BLOCK, RW));
	touch("stored to for reading only", map, 1);
	SEE(mprotect(map, BLOCK, PROT_NONE));
	touch("nothing", map, 0);
	SEE(mprotect(map, BLOCK, PROT_READ));
	touch("again", map, 0);
	SEE(munmap(map, 3 * BLOCK));
	SEE(munmap(map + 1, BLOCK));
	SEE(msync(map, BLOCK, MS_SYNC));
	map = mmap(NULL, 3 * BLOCK, PROT_READ, MAP_SHARED, fd, 0);
	touch("stored to", map, 1);
	SEE(mprotect(map, BLOCK, RW));
	touch("stored to", map, 1);
	SEE(msync(map, BLOCK, MS_SYNC | MS_ASYNC));
	SEE(msync(map + 1, BLOCK, MS_SYNC));
	SEE(msync(map, BLOCK, MS_SYNC | MS_INVALIDATE));
	SEE(msync(map, BLOCK, MS_ASYNC));
	SEE(msync(map, BLOCK, 0));
	SEE(madvise(map, 3 * BLOCK, MADV_WILLNEED));
	SEE(madvise(map, 3 * BLOCK, MADV_DONTNEED));
	SEE(map[0]);
	SEE(munmap(map, 3 * BLOCK));
	close(fd), close(reader), close(writer);
	content("after");
}

static void both_ways(void)
{
	int fd = fresh(200000), other = open(path, O_RDWR), direct = open(path, O_RDWR | O_DIRECT);
	char *map = mmap(NULL, 200000, RW, MAP_SHARED, fd, 0), *part;
	see("content", memcmp(map, seen, 200000));
	map[5] = 'a', map[70000] = 'b', map[199999] = 'c';
	SEE(pread(other, seen, 1, 5));
	see("read", seen[0]);
	SEE(pread(direct, seen, 2 * BLOCK, 17 * BLOCK));
	see("read", seen[70000 - 17 * BLOCK]);
	SEE(pwrite(other, "xyz", 3, 69999));
	see("loaded", map[70000]);
	memset(seen, 'd', BLOCK);
	SEE(pwrite(direct, seen, BLOCK, 2 * BLOCK));
	see("loaded", map[2 * BLOCK + 77]);
	map[2 * BLOCK + 78] = 'e', map[2 * BLOCK - 1] = 'f';
	part = mmap(NULL, 3 * BLOCK, PROT_READ, MAP_SHARED, other, BLOCK);
	see("another mapping", part[BLOCK + 78]);
	part = mmap(NULL, BLOCK, RW, MAP_PRIVATE, other, 2 * BLOCK);
	see("a private one", part[78]);
	part[78] = 'g';
	see("is private", map[2 * BLOCK + 78]);
	/* A buffer that is the mapping. */
	SEE(pwrite(other, map + 2 * BLOCK, BLOCK, 3 * BLOCK));
	see("loaded", map[3 * BLOCK + 78]);
	SEE(pread(other, map + 10 * BLOCK, BLOCK, 10 * BLOCK));
	SEE(pread(other, map + 11 * BLOCK, BLOCK, 2 * BLOCK));
	see("loaded", map[11 * BLOCK + 78]);
	SEE(msync(map, 200000, MS_SYNC));
	content("before");
	close(fd), close(direct);
	map[100] = 'h';
	SEE(pread(other, seen, 1, 100));
	see("read", seen[0]);
	SEE(munmap(map, 200000));
	SEE(pread(other, seen, 1, 100));
	see("read", seen[0]);
	close(other);
	content("after");
}

static void asynchronous(void)
{
	int fd = fresh(16 * BLOCK), direct = open(path, O_RDWR | O_DIRECT);
	char *map = mmap(NULL, 16 * BLOCK, RW, MAP_SHARED, fd, 0);
	io_context_t context = 0;
	struct iocb one, *list = &one;
	struct io_event event;
	SEE(io_setup(4, &context));
	for (int round = 0; round < 4; round++) {
		int file = round & 1 ? direct : fd;
		memset(seen, 'A' + round, 2 * BLOCK);
		if (round & 2) {
			memset(map + BLOCK, 'S' + round, BLOCK);
			io_prep_pread(&one, file, seen, 2 * BLOCK, BLOCK);
		} else {
			io_prep_pwrite(&one, file, seen, 2 * BLOCK, BLOCK);
		}
		SEE(io_submit(context, 1, &list));
		SEE(io_getevents(context, 1, 1, &event, NULL));
		see("result", (long)event.res);
		see("loaded", map[BLOCK]);
		see("buffer", seen[0]);
		see("buffer's end", seen[2 * BLOCK - 1]);
	}
	map[0] = 'z';
	io_prep_fsync(&one, fd);
	SEE(io_submit(context, 1, &list));
	SEE(io_getevents(context, 1, 1, &event, NULL));
	see("result", (long)event.res);
	io_destroy(context);
	munmap(map, 16 * BLOCK), close(fd), close(direct);
	content("after");
}

static void sizes(void)
{
	int fd = fresh(2 * BLOCK + 100);
	char *map = mmap(NULL, 40 * BLOCK, RW, MAP_SHARED, fd, 0);
	see("tail", map[2 * BLOCK + 100] + map[3 * BLOCK - 1]);
	touch("behind the last page", map + 3 * BLOCK, 0);
	touch("behind the last page", map + 3 * BLOCK, 1);
	map[2 * BLOCK + 100] = 'x', map[2 * BLOCK + 99] = 'y';
	SEE(pread(fd, seen, BLOCK, 2 * BLOCK));
	see("read", seen[99]);
	SEE(ftruncate(fd, 30 * BLOCK));
	see("the tail is zeros", map[2 * BLOCK + 100]);
	touch("inside now", map + 20 * BLOCK + 5, 1);
	SEE(pread(fd, seen, 1, 20 * BLOCK + 5));
	see("read", seen[0]);
	SEE(pwrite(fd, "end", 3, 31 * BLOCK));
	see("loaded", map[31 * BLOCK + 1]);
	touch("behind it", map + 32 * BLOCK, 1);
	int adder = open(path, O_WRONLY | O_APPEND);
	memset(seen, 'q', 2 * BLOCK);
	SEE(write(adder, seen, 2 * BLOCK));
	see("loaded", map[32 * BLOCK + 700]);
	close(adder);
	SEE(ftruncate(fd, BLOCK + 10));
	touch("cut off", map + 2 * BLOCK, 0);
	see("zeros", map[BLOCK + 10]);
	see("kept", map[BLOCK + 9]);
	SEE(ftruncate(fd, 3 * BLOCK));
	touch("back as zeros", map + 2 * BLOCK + 99, 0);
	SEE(pread(fd, map + 10 * BLOCK, BLOCK, 0));
	SEE(pwrite(fd, map + 10 * BLOCK, BLOCK, 0));
	memset(map, 'p', 3 * BLOCK);
	SEE(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 100, BLOCK + 100));
	see("punched", map[100]);
	see("punched", map[BLOCK + 199]);
	see("not punched", map[BLOCK + 200]);
	see("not punched", map[99]);
	SEE(madvise(map + 2 * BLOCK, BLOCK, MADV_REMOVE));
	see("removed", map[2 * BLOCK]);
	struct stat st;
	fstat(fd, &st);
	see("size", st.st_size);
	munmap(map, 40 * BLOCK);
	close(fd);
	content("after");
}

static void holes(void)
{
	int fd = fresh(0);
	SEE(ftruncate(fd, 64 * BLOCK));
	char *map = mmap(NULL, 64 * BLOCK, RW, MAP_SHARED, fd, 0);
	map[20 * BLOCK] = 1;
	SEE(lseek(fd, 0, SEEK_DATA));
	SEE(lseek(fd, 20 * BLOCK, SEEK_HOLE));
	SEE(msync(map, 64 * BLOCK, MS_SYNC));
	map[20 * BLOCK] = 0;
	munmap(map, 64 * BLOCK);
	close(fd);
	content("after");
}

static void areas(void)
{
	int fd = fresh(32 * BLOCK);
	char *map = mmap(NULL, 32 * BLOCK, RW, MAP_SHARED, fd, 0);
	memset(map, 'a', 32 * BLOCK);
	SEE(munmap(map + 10 * BLOCK, 5 * BLOCK));
	touch("unmapped", map + 12 * BLOCK, 0);
	touch("before it", map + 9 * BLOCK, 0);
	touch("after it", map + 15 * BLOCK, 1);
	SEE(msync(map, 32 * BLOCK, MS_SYNC));
	SEE(msync(map + 15 * BLOCK, 17 * BLOCK, MS_SYNC));
	see("over it", mmap(map + 2 * BLOCK, BLOCK, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == map + 2 * BLOCK);
	see("zeros", map[2 * BLOCK]);
	map[2 * BLOCK] = 'x';
	SEE(pread(fd, seen, 1, 2 * BLOCK));
	see("read", seen[0]);
	see("another place of the file", mmap(map, 2 * BLOCK, RW, MAP_SHARED | MAP_FIXED, fd, 20 * BLOCK) == map);
	map[0] = 'b';
	see("in both", map[20 * BLOCK]);
	char *moved = mremap(map + 15 * BLOCK, BLOCK, 2 * BLOCK, 0);
	see("mremap in the way", moved == MAP_FAILED);
	moved = mremap(map + 15 * BLOCK, 17 * BLOCK, 40 * BLOCK, MREMAP_MAYMOVE);
	see("moved", moved != MAP_FAILED);
	see("content", moved[5 * BLOCK]);
	touch("behind the end", moved + 17 * BLOCK, 1);
	SEE(ftruncate(fd, 50 * BLOCK));
	touch("inside now", moved + 30 * BLOCK, 1);
	SEE(pread(fd, seen, 1, 45 * BLOCK));
	see("read", seen[0]);
	moved = mremap(moved, 40 * BLOCK, 3 * BLOCK, 0);
	moved[2 * BLOCK] = 'd';
	touch("shrunk", moved + 3 * BLOCK, 1);
	close(fd);
	SEE(munmap(moved, 3 * BLOCK));
	SEE(munmap(map, 10 * BLOCK));
	content("after");
	/* By number. */
	fd = fresh(BLOCK);
	char *raw = (char *)syscall(SYS_mmap, NULL, BLOCK, RW, MAP_SHARED, fd, 0);
	raw[7] = 'r';
	SEE(syscall(SYS_msync, raw, BLOCK, MS_SYNC));
	SEE(syscall(SYS_munmap, raw, BLOCK));
	close(fd);
	content("after");
}

static void processes(void)
{
	int fd = fresh(64 * BLOCK), to[2], from[2];
	char *map = mmap(NULL, 64 * BLOCK, RW, MAP_SHARED, fd, 0), byte;
	close(fd);
	pipe(to), pipe(from);
	fflush(stdout);
	pid_t child = fork();
	if (child == 0) {
		read(to[0], &byte, 1);
		int wrong = map[100] != 'p';
		map[5 * BLOCK] = 'c';
		write(from[1], "", 1);
		read(to[0], &byte, 1);
		int own = open(path, O_RDWR);
		wrong += pread(own, &byte, 1, 200) != 1 || byte != 'q';
		wrong += pwrite(own, "w", 1, 300) != 1;
		char *again = mmap(NULL, 64 * BLOCK, RW, MAP_SHARED, own, 0);
		again[400] = 'v';
		_exit(wrong);
	}
	map[100] = 'p';
	write(to[1], "", 1);
	read(from[0], &byte, 1);
	see("the child stored", map[5 * BLOCK]);
	map[200] = 'q';
	write(to[1], "", 1);
	wait_for(child);
	see("the child wrote", map[300]);
	see("the child stored", map[400]);
	/* The parent unmaps, the child goes on. */
	child = fork();
	if (child == 0) {
		read(to[0], &byte, 1);
		map[500] = 'u';
		_exit(map[600] != 't');
	}
	map[600] = 't';
	munmap(map, 64 * BLOCK);
	write(to[1], "", 1);
	wait_for(child);
	content("after");
	/* Killed by the parent. */
	child = fork();
	if (child == 0) {
		int own = open(path, O_RDWR);
		map = mmap(NULL, 64 * BLOCK, RW, MAP_SHARED, own, 0);
		map[700] = 's';
		write(from[1], "", 1);
		pause();
	}
	read(from[0], &byte, 1);
	kill(child, SIGKILL);
	wait_for(child);
	content("after");
	child = fork();
	if (child == 0) {
		int own = open(path, O_RDWR);
		map = mmap(NULL, 64 * BLOCK, RW, MAP_SHARED, own, 0);
		map[800] = 'r';
		execl("/bin/true", "true", NULL);
		_exit(9);
	}
	wait_for(child);
	content("after");
	/* An exec that fails leaves it mapped. */
	fd = open(path, O_RDWR);
	map = mmap(NULL, 64 * BLOCK, RW, MAP_SHARED, fd, 0);
	int nothing = memfd_create("nothing", 0);
	SEE(write(nothing, "no program", 10));
	SEE(execveat(nothing, "", (char *[]){"x", NULL}, environ, AT_EMPTY_PATH));
	close(nothing);
	map[900] = 'e';
	SEE(pread(fd, &byte, 1, 900));
	see("read", byte);
	munmap(map, 64 * BLOCK);
	close(fd);
	content("after");
	close(to[0]), close(to[1]), close(from[0]), close(from[1]);
}

/* Four processes add to numbers in one mapping and to the file by turns. */
static void together(void)
{
	int fd = fresh(0);
	SEE(ftruncate(fd, 32 * BLOCK));
	fflush(stdout);
	for (int job = 0; job < 4; job++)
		if (fork() == 0) {
			int own = open(path, O_RDWR), wrong = 0;
			long *map = mmap(NULL, 32 * BLOCK, RW, MAP_SHARED, own, 0);
			for (long round = 1; round <= 200; round++) {
				__atomic_fetch_add(&map[0], 1, __ATOMIC_SEQ_CST);
				long place = BLOCK * (1 + job) + 8 * (round % 100), other;
				if (round & 1) {
					map[place / 8] = round;
					wrong += pread(own, &other, 8, place) != 8 || other != round;
				} else {
					wrong += pwrite(own, &round, 8, place) != 8 || map[place / 8] != round;
				}
				if (round % 50 == 0)
					wrong += msync(map, 32 * BLOCK, MS_SYNC) != 0;
			}
			_exit(wrong);
		}
	for (int job = 0; job < 4; job++)
		wait_for(-1);
	close(fd);
	content("after");
}

int main(int count, char **arguments)
{
	if (count != 2)
		return 2;
	setvbuf(stdout, NULL, _IOLBF, 0);
	path = arguments[1];
	signal(SIGBUS, on_fault), signal(SIGSEGV, on_fault);
	refusals();
	both_ways();
	asynchronous();
	sizes();
	holes();
	areas();
	processes();
	together();
	printf("done\n");
	return 0;
}
