/*
 * What a process passes on by system calls of its own: exec, forks, limits; and memory that it may
 * not make files of. Prints the same lines natively and on a protected file.
 *
 * Usage: passing PATH. The file exists.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <libaio.h>
#include <linux/sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "observe.h"

extern char **environ;
static const char *self, *path;

/* The instruction itself, past every symbol; the number is set just before it. */
static long own(long a, long b, long c)
{
	long result;
	__asm__ volatile("movl $59, %%eax\n\tsyscall"
			 : "=a"(result)
			 : "D"(a), "S"(b), "d"(c)
			 : "rcx", "r11", "memory");
	return result;
}

static long own_limit(long a, long b, long c, long d)
{
	long result;
	register long r10 __asm__("r10") = d;
	__asm__ volatile("movl $302, %%eax\n\tsyscall"
			 : "=a"(result)
			 : "D"(a), "S"(b), "d"(c), "r"(r10)
			 : "rcx", "r11", "memory");
	return result;
}

static int ended(pid_t child)
{
	int status = 0;
	waitpid(child, &status, 0);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

/* The program that was executed: reads on in what it was left. */
static int heir(int fd)
{
	char text[8] = "";
	see("inherited", read(fd, text, 4));
	puts(text);
	SEE(lseek(fd, 0, SEEK_CUR));
	SEE(pwrite(fd, "heir", 4, 100));
	close(fd);
	return 0;
}

enum way { CALL, AT, EMPTY, OWN, WAYS };

static void executing(void)
{
	for (enum way way = 0; way < WAYS; way++) {
		int fd = open(path, O_RDWR);
		int program = open(self, O_PATH);
		char number[16];
		pwrite(fd, "01234567", 8, 0);
		lseek(fd, way, SEEK_SET);
		snprintf(number, sizeof number, "%d", fd);
		char *arguments[] = {(char *)self, (char *)path, number, NULL};
		pid_t child = fork();
		if (child == 0) {
			switch (way) {
			case CALL: syscall(SYS_execve, self, arguments, environ); break;
			case AT: syscall(SYS_execveat, AT_FDCWD, self, arguments, environ, 0); break;
			case EMPTY: syscall(SYS_execveat, program, "", arguments, environ, AT_EMPTY_PATH); break;
			default: own((long)self, (long)arguments, (long)environ);
			}
			_exit(9);
		}
		see("ended", ended(child));
		see("position", lseek(fd, 0, SEEK_CUR));
		char text[8] = "";
		pread(fd, text, 4, 100);
		puts(text);
		errno = 0;
		see("an exec of nothing", syscall(SYS_execve, "/none", arguments, environ));
		see("still open", pread(fd, text, 4, 0));
		pwrite(fd, "....", 4, 100);
		close(fd), close(program);
	}
	/* The only process that has it open becomes another program. */
	pid_t child = fork();
	if (child == 0) {
		int fd = open(path, O_RDWR);
		char number[16];
		snprintf(number, sizeof number, "%d", fd);
		char *arguments[] = {(char *)self, (char *)path, number, NULL};
		own((long)self, (long)arguments, (long)environ);
		_exit(9);
	}
	see("alone", ended(child));
}

static void forking(void)
{
	int fd = open(path, O_RDWR);
	pwrite(fd, "abcdefgh", 8, 0);
	for (int i = 0; i < 2; i++) {
		struct clone_args how = {.exit_signal = SIGCHLD};
		long child = i ? syscall(SYS_clone3, &how, sizeof how)
			       : syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
		char text[8] = "";
		if (child == 0) {
			read(fd, text, 2);
			close(fd);
			_exit(text[1]);
		}
		see("the child's", ended(child));
		see("the parent's", read(fd, text, 2));
		puts(text);
	}
	close(fd);
}

static void limits(void)
{
	int fd = open(path, O_RDWR);
	struct rlimit limit = {4096, 8192}, all;
	getrlimit(RLIMIT_FSIZE, &all);
	signal(SIGXFSZ, SIG_IGN);
	limit.rlim_max = all.rlim_max;
	see("prlimit", own_limit(0, RLIMIT_FSIZE, (long)&limit, 0));
	SEE(ftruncate(fd, 4096));
	SEE(ftruncate(fd, 4097));
	SEE(pwrite(fd, "x", 1, 4096));
	see("setrlimit", syscall(SYS_setrlimit, RLIMIT_FSIZE, &all));
	SEE(pwrite(fd, "x", 1, 4096));
	close(fd);
}

/* Under a limit on files that is smaller than any of our memory is. */
static int confined(int hard)
{
	struct rlimit limit;
	getrlimit(RLIMIT_FSIZE, &limit);
	limit.rlim_cur = 512;
	if (hard)
		limit.rlim_max = 512;
	SEE(setrlimit(RLIMIT_FSIZE, &limit));
	char *arguments[] = {(char *)self, (char *)path, hard ? "ring" : "all", NULL};
	execv(self, arguments);
	return 9;
}

static void confined_heir(int all)
{
	io_context_t context = 0;
	see("io_setup", io_setup(16, &context));
	struct iocb iocb, *list[] = {&iocb};
	struct io_event event;
	int eventless = open("/dev/zero", O_RDONLY);
	static char room[4096];
	io_prep_pread(&iocb, eventless, room, 16, 0);
	see("io_submit", io_submit(context, 1, list));
	see("io_getevents", io_getevents(context, 1, 1, &event, NULL));
	see("io_destroy", io_destroy(context));
	if (all) {
		int fd = open(path, O_RDWR);
		see("open", fd < 0 ? -1 : 0);
		see("read", pread(fd, room, 4096, 0));
		char *map = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, fd, 0);
		see("map", map == MAP_FAILED ? -1 : memcmp(map, room, 4096));
		close(fd);
	}
}

int main(int argc, char **argv)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	self = argv[0], path = argv[1];
	if (argc == 3 && argv[2][0] >= '0' && argv[2][0] <= '9')
		return heir(atoi(argv[2]));
	if (argc == 3) {
		confined_heir(argv[2][0] == 'a');
		return 0;
	}
	int fd = open(path, O_RDWR);
	SEE(ftruncate(fd, 8192));
	close(fd);
	executing();
	forking();
	limits();
	for (int hard = 0; hard < 2; hard++) {
		pid_t child = fork();
		if (child == 0)
			_exit(confined(hard));
		see("confined", ended(child));
	}
	puts("done");
	return 0;
}
