/*
 * peek DIR: tries to read the file DIR/there, to list DIR, and to run DIR/program, in every way there
 * is, by way of libc and by system call instructions of its own. Prints each way and the errno that
 * it got; 0 and the first byte where it could read.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "raw.h"

/* Of a descriptor or a negative errno: whether it can be read. */
static void tell(const char *way, long fd)
{
	char byte;

	if (fd >= 0 && read((int)fd, &byte, 1) == 1)
		printf("%s 0 %c\n", way, byte);
	else
		printf("%s %ld\n", way, fd < 0 ? -fd : (long)errno);
	if (fd >= 0)
		close((int)fd);
}

static long of_libc(int fd)
{
	return fd < 0 ? -errno : fd;
}

static void list(const char *way, DIR *directory)
{
	printf("%s %d\n", way, directory ? 0 : errno);
	if (directory)
		closedir(directory);
}

static void run(const char *way, const char *program, int by_instruction)
{
	char *const nothing[] = {(char *)program, NULL};
	int status;
	pid_t child = fork();

	if (child == 0) {
		long error;

		if (by_instruction) {
			error = -raw(SYS_execve, (long)program, (long)nothing, 0, 0);
		} else {
			execv(program, nothing);
			error = errno;
		}
		_exit((int)error);
	}
	waitpid(child, &status, 0);
	printf("%s %d\n", way, WIFEXITED(status) ? WEXITSTATUS(status) : -1);
}

int main(int argc, char **argv)
{
	struct open_how how = {.flags = O_RDONLY};
	char there[4200], program[4200], by_proc[4300];
	FILE *stream;
	int directory;

	if (argc != 2)
		return 2;
	setvbuf(stdout, NULL, _IONBF, 0);
	snprintf(there, sizeof there, "%.4096s/there", argv[1]);
	snprintf(program, sizeof program, "%.4096s/program", argv[1]);
	tell("open", of_libc(open(there, O_RDONLY)));
	tell("open direct", of_libc(open(there, O_RDONLY | O_NOATIME)));
	stream = fopen(there, "r");
	tell("fopen", stream ? of_libc(dup(fileno(stream))) : -errno);
	directory = open(argv[1], O_PATH | O_DIRECTORY);
	tell("openat below a handle", of_libc(openat(directory, "there", O_RDONLY)));
	tell("syscall openat", of_libc((int)syscall(SYS_openat, AT_FDCWD, there, O_RDONLY)));
	tell("raw open", raw(SYS_open, (long)there, O_RDONLY, 0, 0));
	tell("raw openat", raw(SYS_openat, AT_FDCWD, (long)there, O_RDONLY, 0));
	tell("raw openat2", raw(SYS_openat2, AT_FDCWD, (long)there, (long)&how, sizeof how));
	snprintf(by_proc, sizeof by_proc, "/proc/self/root%s", there);
	tell("raw openat by /proc", raw(SYS_openat, AT_FDCWD, (long)by_proc, O_RDONLY, 0));
	list("opendir", opendir(argv[1]));
	run("exec", program, 0);
	run("raw exec", program, 1);
	return 0;
}
