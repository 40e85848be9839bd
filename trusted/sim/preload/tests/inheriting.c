/*
 * Descriptors that pass through exec. Prints a line for every observation; the same program must
 * print the same lines on an ordinary file on ext4 and on a protected file.
 *
 * Usage: inheriting PATH. The file exists; its content and size do not matter. With more arguments
 * it is the program that is executed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "observe.h"

#define FD "10"
#define OTHER "11"

extern char **environ;
static char *self, *path;

static int executed(char **arguments)
{
	const char *what = arguments[2];
	int fd = atoi(arguments[3]);
	char data[16] = {0};
	if (!strcmp(what, "read")) {
		SEE(read(fd, data, 4));
		printf("%s\n", data);
		SEE(lseek(fd, 0, SEEK_CUR));
		SEE(fcntl(fd, F_GETFL));
		SEE(fcntl(fd, F_GETFD));
	} else if (!strcmp(what, "closed")) {
		SEE(read(fd, data, 4));
		SEE(fcntl(fd, F_GETFD));
	} else if (!strcmp(what, "append")) {
		for (int i = 0; i < 20; i++)
			if (write(fd, "0123456789", 10) != 10)
				return 1;
	} else if (!strcmp(what, "again")) {
		execl(self, self, path, "read", arguments[3], (char *)NULL);
		return 2;
	} else if (!strcmp(what, "open")) {
		int own = open(path, O_RDWR);
		SEE(pread(own, data, 4, 0));
		SEE(pwrite(own, "OPEN", 4, 0));
		SEE(read(fd, data, 4));
		printf("%s\n", data);
	}
	fflush(stdout);
	return 21;
}

static void wait_for(pid_t child)
{
	int status = 0;
	waitpid(child, &status, 0);
	see("ended with", WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status));
}

static pid_t run(const char *what, const char *fd)
{
	char *arguments[] = {self, path, (char *)what, (char *)fd, NULL};
	fflush(stdout);
	pid_t child = fork();
	if (child == 0) {
		execv(self, arguments);
		_exit(3);
	}
	return child;
}

int main(int count, char **arguments)
{
	self = arguments[0], path = arguments[1];
	if (count > 3)
		return executed(arguments);
	int fd = open(path, O_RDWR | O_TRUNC);
	for (int i = 0; i < 100; i++)
		dprintf(1, ""), write(fd, "abcdefghijklmnopqrstuvwxyz", 26);
	SEE(dup2(fd, atoi(FD)));
	close(fd);
	fd = atoi(FD);
	lseek(fd, 3, SEEK_SET);
	wait_for(run("read", FD));
	see("shared position", lseek(fd, 0, SEEK_CUR));
	wait_for(run("again", FD));
	see("shared position", lseek(fd, 0, SEEK_CUR));
	fcntl(fd, F_SETFD, FD_CLOEXEC);
	wait_for(run("closed", FD));
	see("position", lseek(fd, 0, SEEK_CUR));
	fcntl(fd, F_SETFD, 0);
	lseek(fd, 0, SEEK_SET);
	wait_for(run("open", FD));
	see("shared position", lseek(fd, 0, SEEK_CUR));
	char *list[] = {self, path, "read", FD, NULL};
	fflush(stdout);
	pid_t child = vfork();
	if (child == 0) {
		execve(self, list, environ);
		_exit(3);
	}
	wait_for(child);
	see("shared position", lseek(fd, 0, SEEK_CUR));
	posix_spawn_file_actions_t actions;
	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_adddup2(&actions, fd, atoi(OTHER));
	posix_spawn_file_actions_addclose(&actions, fd);
	list[3] = OTHER;
	fflush(stdout);
	/* Told when the child has ended: both write to the same place. */
	int spawned = posix_spawn(&child, self, &actions, NULL, list, environ);
	wait_for(child);
	see("posix_spawn", spawned);
	see("shared position", lseek(fd, 0, SEEK_CUR));
	/* The child is on its way when the parent closes. */
	list[3] = FD;
	fflush(stdout);
	child = vfork();
	if (child == 0) {
		execv(self, list);
		_exit(3);
	}
	close(fd);
	wait_for(child);
	fd = open(path, O_RDWR);
	dup2(fd, atoi(FD)), close(fd), fd = atoi(FD);
	/* What cannot be executed leaves everything as it is. */
	fflush(stdout);
	child = fork();
	if (child == 0) {
		char *none[] = {"none", NULL};
		lseek(fd, 50, SEEK_SET);
		int result = execv("/dev/null", none);
		result += execv("/nonexistent", none);
		char data[8];
		_exit(result == -2 && read(fd, data, 8) == 8 && lseek(fd, 0, SEEK_CUR) == 58 ? 5 : 6);
	}
	wait_for(child);
	see("shared position", lseek(fd, 0, SEEK_CUR));
	close(fd);
	/* Programs that append beside each other. */
	fd = open(path, O_WRONLY | O_TRUNC | O_APPEND);
	dup2(fd, atoi(FD)), close(fd), fd = atoi(FD);
	pid_t children[4];
	for (int i = 0; i < 4; i++)
		children[i] = run("append", FD);
	for (int i = 0; i < 4; i++)
		wait_for(children[i]);
	see("size", lseek(fd, 0, SEEK_END));
	close(fd);
	/* The last line comes from another program, with the only descriptor. */
	fd = open(path, O_RDONLY);
	dup2(fd, atoi(FD)), close(fd);
	char command[4096];
	snprintf(command, sizeof command, "head -c 6 <&%s; wc -c < %s; echo; echo done", FD, path);
	fflush(stdout);
	execlp("bash", "bash", "-c", command, (char *)NULL);
	return 1;
}
