/*
 * Children that share open files: fork, vfork, exec. Prints a line for every observation; the same
 * program must print the same lines on an ordinary file on ext4 and on a protected file.
 *
 * Usage: processes PATH (absolute). The file exists; its content and size do not matter.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <libaio.h>
#include <pthread.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "observe.h"

#define BLOCK 4096
#define JOBS 4
#define BLOCKS 32 /* for each job */

extern char **environ;
static char *page;

static int wait_for(pid_t child)
{
	int status = 0;
	waitpid(child, &status, 0);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

/* One job: its own context, its own blocks of a file opened before the fork. */
static int job(int fd, int number)
{
	io_context_t context = 0;
	struct iocb blocks[BLOCKS], *list[BLOCKS];
	struct io_event events[BLOCKS];
	char *data = aligned_alloc(BLOCK, BLOCKS * BLOCK);
	if (io_setup(BLOCKS, &context) != 0)
		return 10;
	for (int i = 0; i < BLOCKS; i++) {
		memset(data + i * BLOCK, 'a' + number * 5 + i % 5, BLOCK);
		io_prep_pwrite(&blocks[i], fd, data + i * BLOCK, BLOCK, (number * BLOCKS + i) * (long long)BLOCK);
		list[i] = &blocks[i];
	}
	if (io_submit(context, BLOCKS, list) != BLOCKS)
		return 11;
	if (io_getevents(context, BLOCKS, BLOCKS, events, NULL) != BLOCKS)
		return 12;
	for (int i = 0; i < BLOCKS; i++)
		if (events[i].res != BLOCK)
			return 13;
	return number;
}

static void jobs(const char *path)
{
	int fd = open(path, O_RDWR | O_TRUNC | O_DIRECT);
	pid_t children[JOBS];
	for (int i = 0; i < JOBS; i++)
		if ((children[i] = fork()) == 0)
			_exit(job(fd, i));
	for (int i = 0; i < JOBS; i++)
		see("job", wait_for(children[i]));
	long wrong = 0;
	for (int i = 0; i < JOBS * BLOCKS; i++) {
		if (pread(fd, page, BLOCK, i * (off_t)BLOCK) != BLOCK)
			wrong++;
		for (int k = 0; k < BLOCK; k++)
			wrong += page[k] != 'a' + i / BLOCKS * 5 + i % BLOCKS % 5;
	}
	see("wrong bytes", wrong);
	see("size", lseek(fd, 0, SEEK_END));
	close(fd);
}

/* The parent closes at once: the children hold the file. */
static void orphans(const char *path)
{
	int hold[2];
	pipe(hold);
	int fd = open(path, O_RDWR);
	pid_t child = fork();
	if (child == 0) {
		close(hold[1]);
		read(hold[0], page, 1); /* until the parent has closed */
		memset(page, 'o', BLOCK);
		_exit(pwrite(fd, page, BLOCK, 0) == BLOCK && fsync(fd) == 0 ? 7 : 8);
	}
	see("parent closes", close(fd));
	close(hold[0]);
	close(hold[1]);
	see("child that outlived the parent's descriptor", wait_for(child));
	fd = open(path, O_RDONLY);
	see("read", pread(fd, page, BLOCK, 0));
	see("its byte", page[17]);
	close(fd);
}

/* What a vfork child closes is still open in the parent. */
static void vforks(const char *path)
{
	int fd = open(path, O_RDWR);
	pid_t child = vfork();
	if (child == 0) {
		close(fd);
		_exit(5);
	}
	see("vfork child", wait_for(child));
	see("parent still reads", pread(fd, page, 10, 0));
	child = vfork();
	if (child == 0) {
		execl("/bin/true", "true", (char *)NULL);
		_exit(6);
	}
	see("vfork and exec", wait_for(child));
	child = vfork();
	if (child == 0) {
		char *none[] = {"none", NULL};
		execv("/nonexistent/program", none);
		_exit(127);
	}
	see("vfork and exec of nothing", wait_for(child));
	see("parent still reads", pread(fd, page, 10, 0));
	char *arguments[] = {"sh", "-c", "exit 9", NULL};
	posix_spawn(&child, "/bin/sh", NULL, NULL, arguments, environ);
	see("spawn", wait_for(child));
	see("system", WEXITSTATUS(system("exit 4")));
	child = fork();
	if (child == 0) {
		execv("/bin/sh", arguments);
		_exit(1);
	}
	see("fork and exec", wait_for(child));
	see("parent still reads", pread(fd, page, 10, 0));
	close(fd);
}

static void *from_a_thread(void *fd)
{
	sigset_t all;
	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, NULL);
	errno = 0;
	long got = pread((int)(long)fd, (char *)16, 10, 0);
	return (void *)(got == -1 ? (long)errno : got);
}

static void threads(const char *path)
{
	int fd = open(path, O_RDWR);
	pthread_t thread;
	void *result;
	pthread_create(&thread, NULL, from_a_thread, (void *)(long)fd);
	pthread_join(thread, &result);
	see("bad buffer in a thread that blocks all signals", (long)result == EFAULT);
	close(fd);
}

/* A ring that the program moves stays its context. */
static void ring(const char *path)
{
	int fd = open(path, O_RDWR | O_DIRECT);
	io_context_t context = 0;
	struct iocb block, *list = &block;
	struct io_event event;
	see("io_setup", io_setup(1, &context));
	void *to = mmap(NULL, 65536, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	void *moved = mremap(context, 4096, 4096, MREMAP_MAYMOVE | MREMAP_FIXED, to);
	see("moved", moved == to);
	io_prep_pread(&block, fd, page, BLOCK, 0);
	see("the old address", io_submit(context, 1, &list) == -EINVAL);
	see("the new one", io_submit(moved, 1, &list));
	see("event", io_getevents(moved, 1, 1, &event, NULL));
	see("its result", (long)event.res);
	errno = 0;
	moved = mremap(moved, 4096, 8192, MREMAP_MAYMOVE);
	see("growing", moved == MAP_FAILED ? -1 : 0);
	see("io_destroy", io_destroy(to));
	see("again", io_destroy(to) == -EINVAL);
	close(fd);
}

int main(int count, char **arguments)
{
	if (count != 2)
		return 2;
	setvbuf(stdout, NULL, _IONBF, 0);
	page = aligned_alloc(BLOCK, BLOCK);
	jobs(arguments[1]);
	orphans(arguments[1]);
	vforks(arguments[1]);
	threads(arguments[1]);
	ring(arguments[1]);
	printf("done\n");
	return 0;
}
