/*
 * Members of a program that are killed: the others go on with the same file. Prints a line for each
 * kind of death; the same program must print the same lines on an ordinary file on ext4 and on a
 * protected file.
 *
 * Usage: members PATH (absolute; O_DIRECT; at least 1 MiB can be written).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <libaio.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/wait.h>
#include <unistd.h>

#define BLOCK 4096
#define BLOCKS 64
#define BEHIND (BLOCKS * BLOCK)

static const char *path;

static void die(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	_exit(1);
}

static int open_it(void)
{
	int fd = open(path, O_RDWR | O_DIRECT);
	if (fd < 0)
		die("open");
	return fd;
}

static char *buffer(int byte)
{
	char *data = aligned_alloc(BLOCK, BLOCKS * BLOCK);
	if (!data)
		die("memory");
	memset(data, byte, BLOCKS * BLOCK);
	return data;
}

static void lock(int fd, int command)
{
	struct flock all = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
	if (fcntl(fd, command, &all) != 0 || flock(fd, LOCK_EX) != 0)
		die("lock");
}

static void unlock(int fd)
{
	struct flock all = { .l_type = F_UNLCK, .l_whence = SEEK_SET };
	if (fcntl(fd, F_SETLK, &all) != 0 || flock(fd, LOCK_UN) != 0)
		die("unlock");
}

static void say(int ready)
{
	if (write(ready, "r", 1) != 1)
		die("ready");
}

/* What a member does when it is killed; it tells first that it is there. */
static void member(const char *kind, int ready)
{
	int fd = open_it();
	char *data = buffer('m');
	io_context_t context = 0;
	if (strcmp(kind, "computes") == 0) {
		if (pwrite(fd, data, BLOCK, 0) != BLOCK)
			die("pwrite");
		say(ready);
		for (;;)
			;
	}
	if (strcmp(kind, "has locks") == 0) {
		lock(fd, F_SETLK);
		say(ready);
		pause();
	}
	if (io_setup(BLOCKS, &context) != 0)
		die("io_setup");
	if (strcmp(kind, "waits") == 0) {
		struct io_event event;
		say(ready);
		io_getevents(context, 1, 1, &event, NULL);
	}
	struct iocb blocks[BLOCKS], *list[BLOCKS];
	for (int i = 0; i < BLOCKS; i++) {
		io_prep_pwrite(&blocks[i], fd, data + i * BLOCK, BLOCK, BEHIND + i * BLOCK);
		list[i] = &blocks[i];
	}
	if (io_submit(context, BLOCKS, list) != BLOCKS)
		die("io_submit");
	say(ready);
	if (strcmp(kind, "faults in flight") == 0)
		raise(SIGSEGV);
	pause();
}

int main(int argc, char **argv)
{
	static const char *const kinds[] = { "computes", "has locks", "waits", "in flight",
					     "faults in flight" };
	if (argc != 2)
		return 2;
	path = argv[1];
	char *data = buffer('p'), *back = buffer(0);
	int fd = open_it();
	for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
		int ready[2], status;
		char byte;
		if (pipe(ready) != 0 || pwrite(fd, data, BEHIND, BEHIND) != BEHIND)
			die("prepare");
		pid_t child = fork();
		if (child == 0)
			member(kinds[i], ready[1]);
		close(ready[1]);
		if (read(ready[0], &byte, 1) != 1)
			die("the member ended by itself");
		close(ready[0]);
		if (strncmp(kinds[i], "faults", 6) != 0)
			kill(child, SIGKILL);
		if (waitpid(child, &status, 0) != child)
			die("waitpid");
		printf("%s: killed by %d\n", kinds[i], WTERMSIG(status));
		lock(fd, F_SETLKW);
		if (pwrite(fd, data, BLOCK, 0) != BLOCK || fsync(fd) != 0)
			die("write after it");
		if (strstr(kinds[i], "in flight")) {
			/* What it submitted is written in spite of its end. */
			do {
				if (pread(fd, back, BEHIND, BEHIND) != BEHIND)
					die("read after it");
			} while (memchr(back, 'p', BEHIND));
		}
		unlock(fd);
		printf("%s: the others go on\n", kinds[i]);
		fflush(stdout);
	}
	return 0;
}
