/*
 * Mappings, sendfile, copies between files, splice and the unusual flags of reads and writes on one path. Prints a line for every
 * observation; the same program must print the same lines on an ordinary file on ext4 and on a
 * protected file.
 *
 * Usage: moving PATH. The file exists; its content and size do not matter.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include "observe.h"
#include "touch.h"

#define BLOCK 4096
#define BYTES 200000

static const char *path;
static char data[BYTES];

static void mappings(void)
{
	int fd = open(path, O_RDWR | O_TRUNC);
	int reader = open(path, O_RDONLY), writer = open(path, O_WRONLY), nothing = open(path, O_PATH);
	for (int i = 0; i < BYTES; i++)
		data[i] = (char)(i * 13 + i / 4096 + 1);
	SEE(write(fd, data, BYTES));
	MAP(NULL, 0, PROT_READ, MAP_PRIVATE, fd, 0);
	MAP(NULL, BLOCK, PROT_READ, MAP_PRIVATE, fd, 100);
	MAP(NULL, BLOCK, PROT_READ, MAP_PRIVATE, fd, -BLOCK);
	MAP(NULL, BLOCK, PROT_READ, MAP_PRIVATE, writer, 0);
	MAP(NULL, BLOCK, PROT_READ, MAP_SHARED, writer, 0);
	MAP(NULL, BLOCK, PROT_WRITE, MAP_SHARED, reader, 0);
	MAP(NULL, BLOCK, PROT_READ, MAP_PRIVATE, nothing, 0);
	MAP(NULL, BLOCK, PROT_READ, 0, fd, 0);
	MAP(NULL, SIZE_MAX - 100, PROT_READ, MAP_PRIVATE, fd, 0);
	MAP((void *)100, BLOCK, PROT_READ, MAP_PRIVATE | MAP_FIXED, fd, 0);
	MAP((void *)&data, BLOCK, PROT_READ, MAP_PRIVATE | MAP_FIXED_NOREPLACE, fd, 0);
	signal(SIGBUS, on_fault), signal(SIGSEGV, on_fault);
	char *map = mmap(NULL, 60 * BLOCK, PROT_READ, MAP_PRIVATE, fd, 0);
	see("content", memcmp(map, data, BYTES));
	see("zeros up to the page's end", map[BYTES] + map[BYTES + 500]);
	touch("beyond the last page", map + 55 * BLOCK, 0);
	touch("written to", map, 1);
	SEE(msync(map, BLOCK, MS_SYNC));
	SEE(munmap(map, 60 * BLOCK));
	map = mmap(NULL, 3 * BLOCK, PROT_READ | PROT_WRITE, MAP_PRIVATE, reader, 5 * BLOCK);
	see("content", memcmp(map, data + 5 * BLOCK, 3 * BLOCK));
	memset(map, 7, 3 * BLOCK);
	char byte;
	pread(fd, &byte, 1, 5 * BLOCK);
	see("the file is not changed", byte == data[5 * BLOCK]);
	munmap(map, 3 * BLOCK);
	map = mmap(NULL, BYTES, PROT_READ, MAP_SHARED, reader, 0);
	see("content", memcmp(map, data, BYTES));
	SEE(mprotect(map, BLOCK, PROT_READ | PROT_WRITE));
	SEE(msync(map, BLOCK, MS_SYNC));
	fflush(stdout);
	close(reader), close(fd);
	pid_t child = fork();
	if (child == 0)
		_exit(memcmp(map, data, BYTES) ? 1 : 9);
	int status;
	waitpid(child, &status, 0);
	see("the child's", WEXITSTATUS(status));
	munmap(map, BYTES);
	map = mmap(NULL, 2 * BLOCK, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, writer, 0);
	see("anonymous", map[0]);
	close(writer), close(nothing);
}

static void sending(void)
{
	int fd = open(path, O_RDWR), pair[2], writer = open(path, O_WRONLY);
	static char seen[BYTES];
	socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
	SEE(lseek(fd, 10, SEEK_SET));
	SEE(sendfile(pair[0], fd, NULL, 100));
	SEE(lseek(fd, 0, SEEK_CUR));
	SEE(read(pair[1], seen, BYTES));
	see("content", memcmp(seen, data + 10, 100));
	off_t at = BYTES - 50;
	SEE(sendfile(pair[0], fd, &at, 1000));
	see("offset", at);
	SEE(lseek(fd, 0, SEEK_CUR));
	SEE(read(pair[1], seen, BYTES));
	see("content", memcmp(seen, data + BYTES - 50, 50));
	SEE(sendfile(pair[0], fd, &at, 1000));
	see("offset", at);
	SEE(sendfile(pair[0], fd, NULL, 0));
	at = -1;
	SEE(sendfile(pair[0], fd, &at, 10));
	SEE(sendfile(pair[0], fd, (off_t *)8, 10));
	SEE(sendfile(pair[0], writer, NULL, 10));
	SEE(sendfile(-1, fd, NULL, 10));
	int null = open("/dev/null", O_RDONLY);
	SEE(sendfile(null, fd, NULL, 10));
	close(null);
	fflush(stdout);
	pid_t child = fork();
	if (child == 0) {
		size_t done = 0;
		while (done < BYTES) {
			ssize_t part = read(pair[1], seen + done, BYTES - done);
			if (part <= 0)
				_exit(1);
			done += part;
		}
		_exit(memcmp(seen, data, BYTES) ? 2 : 11);
	}
	lseek(fd, 0, SEEK_SET);
	SEE(sendfile(pair[0], fd, NULL, BYTES + 5000));
	int status;
	waitpid(child, &status, 0);
	see("the child's", WEXITSTATUS(status));
	SEE(tee(fd, pair[0], 10, 0));
	SEE(readahead(fd, 0, 100));
	SEE(readahead(writer, 0, 100));
	close(pair[0]), close(pair[1]), close(fd), close(writer);
}

/* From one place of the file to another, from an ordinary file into it, from it into a pipe. */
static void copying(void)
{
	int fd = open(path, O_RDWR | O_TRUNC), reader = open(path, O_RDONLY);
	int writer = open(path, O_WRONLY), adder = open(path, O_RDWR | O_APPEND), ends[2];
	static char seen[BYTES];
	SEE(write(fd, data, 100000));
	off_t from = 5, to = 100000;
	SEE(copy_file_range(fd, &from, fd, &to, 90000, 0));
	see("from", from), see("to", to);
	SEE(pread(fd, seen, BYTES, 100000));
	see("content", memcmp(seen, data + 5, 90000));
	SEE(lseek(fd, 0, SEEK_CUR));
	from = 189000, to = 300000;
	SEE(copy_file_range(reader, &from, writer, &to, 5000, 0));
	SEE(copy_file_range(reader, &from, writer, &to, 5000, 0));
	SEE(lseek(reader, 10, SEEK_SET));
	SEE(lseek(writer, 400000, SEEK_SET));
	SEE(copy_file_range(reader, NULL, writer, NULL, 10, 0));
	SEE(lseek(reader, 0, SEEK_CUR));
	SEE(lseek(writer, 0, SEEK_CUR));
	from = 0, to = 50;
	SEE(copy_file_range(fd, &from, fd, &to, 100, 0));
	SEE(copy_file_range(fd, &from, fd, &to, 0, 0));
	SEE(copy_file_range(fd, &from, fd, &to, 10, 1));
	SEE(copy_file_range(writer, &from, fd, &to, 10, 0));
	SEE(copy_file_range(fd, &from, reader, &to, 10, 0));
	SEE(copy_file_range(fd, &from, adder, &to, 10, 0));
	SEE(copy_file_range(fd, (off_t *)8, fd, &to, 10, 0));
	to = -1;
	SEE(copy_file_range(fd, &from, fd, &to, 10, 0));

	int plain = memfd_create("plain", 0);
	SEE(write(plain, data, 70000));
	SEE(lseek(fd, 1000, SEEK_SET));
	from = 100;
	SEE(sendfile(fd, plain, &from, 100000));
	see("from", from);
	SEE(lseek(fd, 0, SEEK_CUR));
	SEE(pread(fd, seen, 69900, 1000));
	see("content", memcmp(seen, data + 100, 69900));
	SEE(lseek(plain, 0, SEEK_SET));
	SEE(sendfile(writer, plain, NULL, 10));
	SEE(lseek(plain, 0, SEEK_CUR));
	SEE(sendfile(reader, plain, NULL, 10));
	SEE(sendfile(adder, plain, NULL, 10));
	close(plain);

	pipe(ends);
	SEE(sendfile(fd, ends[0], NULL, 10));
	SEE(fcntl(ends[1], F_SETPIPE_SZ, BLOCK));
	SEE(pwrite(fd, data, 2 * BLOCK, 0));
	from = 0;
	SEE(splice(fd, &from, ends[1], NULL, BLOCK, 0));
	see("from", from);
	SEE(splice(fd, &from, ends[1], NULL, BLOCK, SPLICE_F_NONBLOCK));
	SEE(read(ends[0], seen, BYTES));
	see("content", memcmp(seen, data, BLOCK));
	SEE(lseek(fd, BLOCK, SEEK_SET));
	SEE(splice(fd, NULL, ends[1], NULL, BLOCK, 0));
	SEE(lseek(fd, 0, SEEK_CUR));
	SEE(read(ends[0], seen, BYTES));
	see("content", memcmp(seen, data + BLOCK, BLOCK));
	from = 1 << 30;
	SEE(splice(fd, &from, ends[1], NULL, BLOCK, 0));
	SEE(splice(fd, NULL, ends[1], NULL, 0, 0));
	SEE(splice(fd, NULL, ends[1], &from, 10, 0));
	SEE(splice(writer, NULL, ends[1], NULL, 10, 0));
	SEE(splice(fd, NULL, ends[0], NULL, 10, 0));
	SEE(splice(fd, NULL, reader, NULL, 10, 0));
	SEE(splice(fd, NULL, ends[1], NULL, 10, 0x100));
	signal(SIGPIPE, SIG_IGN);
	close(ends[0]);
	SEE(splice(fd, NULL, ends[1], NULL, 10, 0));
	close(ends[1]), close(fd), close(reader), close(writer), close(adder);
}

static void flags(void)
{
	int fd = open(path, O_RDWR);
	char buffer[100];
	struct iovec part = {buffer, 100};
	SEE(preadv2(fd, &part, 1, BYTES + 1, RWF_NOWAIT));
	SEE(preadv2(fd, &part, 1, 0, 0x80));
	SEE(pwritev2(fd, &part, 1, 0, 0x80));
	SEE(pwritev2(fd, &part, 1, 0, 0x40));
	SEE(preadv2(fd, &part, 1, 0, 0x40));
	SEE(preadv2(fd, &part, 1, 0, 0x1000));
	SEE(preadv2(fd, &part, 1, 0, RWF_HIPRI));
	close(fd);
}

/* Positions after appends that run beside each other: each is the end of its own bytes. */
static void appends(void)
{
	int fd = open(path, O_RDWR | O_TRUNC);
	close(fd);
	fflush(stdout);
	for (int job = 0; job < 4; job++)
		if (fork() == 0) {
			int own = open(path, O_WRONLY | O_APPEND), wrong = 0;
			int check = open(path, O_RDONLY);
			for (int i = 0; i < 50; i++) {
				char line[16], seen[16];
				snprintf(line, sizeof line, "%07d%07d\n", job, i);
				write(own, line, 15);
				pread(check, seen, 15, lseek(own, 0, SEEK_CUR) - 15);
				wrong += memcmp(line, seen, 15) != 0;
			}
			_exit(wrong);
		}
	long wrong = 0;
	for (int job = 0; job < 4; job++) {
		int status = 0;
		wait(&status);
		wrong += WIFEXITED(status) ? WEXITSTATUS(status) : 1000;
	}
	see("wrong positions", wrong);
	struct stat st;
	stat(path, &st);
	see("size", st.st_size);
}

int main(int count, char **arguments)
{
	if (count != 2)
		return 2;
	setvbuf(stdout, NULL, _IOLBF, 0);
	path = arguments[1];
	mappings();
	sending();
	copying();
	flags();
	appends();
	printf("done\n");
	return 0;
}
