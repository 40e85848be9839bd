/*
 * Advisory locks on one path, between open files, processes and programs. Prints a line for every
 * observation; the same program must print the same lines on an ordinary file on ext4 and on a
 * protected file.
 *
 * Usage: locking PATH. The file exists; its content and size do not matter. With a second argument
 * it is the program that is executed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include "observe.h"

static const char *path;
static pid_t parent;

static int lock(int fd, int command, int type, int whence, off_t start, off_t length)
{
	struct flock lock = {.l_type = type, .l_whence = whence, .l_start = start, .l_len = length};
	return fcntl(fd, command, &lock);
}

/* Who holds what in the way of `type` on the range. */
static void held(const char *what, int fd, int command, int type, off_t start, off_t length)
{
	struct flock lock = {.l_type = type, .l_start = start, .l_len = length};
	errno = 0;
	int result = fcntl(fd, command, &lock);
	const char *holder = lock.l_pid == -1 ? "an open file" :
		lock.l_pid == parent ? "the parent" :
		lock.l_pid == getpid() ? "this process" : lock.l_pid ? "another process" : "nobody";
	printf("%s: %d %s, type %d, whence %d, start %ld, length %ld, held by %s\n", what, result,
	       result ? strerrorname_np(errno) : "", lock.l_type, lock.l_whence, (long)lock.l_start,
	       (long)lock.l_len, lock.l_type == F_UNLCK ? "nobody" : holder);
}

/* Runs `body` in a child and waits for it. */
#define IN_CHILD(body) do { \
	fflush(stdout); \
	pid_t child = fork(); \
	if (child == 0) { body; fflush(stdout); _exit(0); } \
	int status = 0; \
	waitpid(child, &status, 0); \
	if (status) see("the child's status", status); \
} while (0)

static void ranges(void)
{
	int fd = open(path, O_RDWR), reader = open(path, O_RDONLY), writer = open(path, O_WRONLY);
	write(fd, "0123456789", 10);
	SEE(lock(fd, F_SETLK, F_WRLCK, SEEK_SET, 10, 10));
	SEE(lock(fd, F_SETLK, F_WRLCK, SEEK_SET, 30, 10));
	SEE(lock(fd, F_SETLK, F_WRLCK, SEEK_SET, 20, 10));
	SEE(lock(fd, F_SETLK, F_RDLCK, SEEK_SET, 22, 3));
	SEE(lock(fd, F_SETLK, F_WRLCK, SEEK_SET, 100, 0));
	SEE(lock(fd, F_SETLK, F_RDLCK, SEEK_CUR, -5, 2));
	IN_CHILD({
		held("below", fd, F_GETLK, F_WRLCK, 0, 5);
		held("in front", fd, F_GETLK, F_WRLCK, 0, 6);
		held("first", fd, F_GETLK, F_RDLCK, 0, 50);
		held("the middle", fd, F_GETLK, F_WRLCK, 22, 1);
		held("readers may", fd, F_GETLK, F_RDLCK, 22, 3);
		held("behind", fd, F_GETLK, F_RDLCK, 25, 2);
		held("to the end", fd, F_GETLK, F_RDLCK, 5000, 1);
		held("of an open file", fd, F_OFD_GETLK, F_WRLCK, 12, 2);
		SEE(lock(fd, F_SETLK, F_WRLCK, SEEK_SET, 15, 1));
		SEE(lock(fd, F_OFD_SETLK, F_RDLCK, SEEK_SET, 15, 1));
		SEE(lock(fd, F_SETLK, F_RDLCK, SEEK_SET, 22, 3));
		SEE(lock(fd, F_SETLK, F_WRLCK, SEEK_SET, 50, 50));
		SEE(lockf(fd, F_TEST, 100));
	});
	SEE(lock(fd, F_SETLK, F_WRLCK, SEEK_SET, 60, 1));
	SEE(lock(fd, F_SETLK, F_UNLCK, SEEK_SET, 12, 3));
	IN_CHILD({
		held("what is left", fd, F_GETLK, F_WRLCK, 10, 5);
		held("the rest", fd, F_GETLK, F_WRLCK, 12, 20);
	});
	SEE(lock(fd, F_SETLK, F_RDLCK, SEEK_SET, 40, -10));
	SEE(lock(fd, F_SETLK, F_RDLCK, SEEK_SET, 5, -10));
	SEE(lock(fd, F_SETLK, F_RDLCK, SEEK_SET, -1, 10));
	SEE(lock(fd, F_SETLK, F_RDLCK, SEEK_SET, INT64_MAX, 2));
	SEE(lock(fd, F_SETLK, F_RDLCK, SEEK_SET, INT64_MAX, 1));
	SEE(lock(fd, F_SETLK, F_RDLCK, SEEK_END, INT64_MAX, 1));
	SEE(lock(fd, F_SETLK, F_RDLCK, 77, 0, 1));
	SEE(lock(fd, F_SETLK, 77, SEEK_SET, 0, 1));
	SEE(lock(fd, F_GETLK, F_UNLCK, SEEK_SET, 0, 1));
	SEE(lock(reader, F_SETLK, F_WRLCK, SEEK_SET, 0, 1));
	SEE(lock(writer, F_SETLK, F_RDLCK, SEEK_SET, 0, 1));
	SEE(lock(reader, F_SETLK, F_RDLCK, SEEK_SET, 0, 1));
	struct flock bad = {.l_type = F_WRLCK, .l_pid = 5, .l_len = 1};
	SEE(fcntl(fd, F_OFD_SETLK, &bad));
	SEE(fcntl(fd, F_SETLK, (void *)8));
	SEE(close(reader));
	IN_CHILD(held("after a close of another number", fd, F_GETLK, F_WRLCK, 0, 0));
	close(fd), close(writer);
}

static void open_files(void)
{
	int fd = open(path, O_RDWR), other = open(path, O_RDWR);
	SEE(lock(fd, F_OFD_SETLK, F_WRLCK, SEEK_SET, 5, 10));
	SEE(lock(other, F_OFD_SETLK, F_WRLCK, SEEK_SET, 0, 10));
	SEE(lock(other, F_SETLK, F_WRLCK, SEEK_SET, 0, 10));
	held("an open file's", other, F_GETLK, F_RDLCK, 0, 0);
	SEE(flock(fd, LOCK_SH));
	SEE(flock(other, LOCK_SH | LOCK_NB));
	SEE(flock(fd, LOCK_EX | LOCK_NB));
	SEE(flock(other, LOCK_EX | LOCK_NB));
	SEE(flock(other, LOCK_UN));
	SEE(flock(fd, 77));
	SEE(flock(fd, LOCK_EX | LOCK_NB));
	IN_CHILD({
		SEE(lock(fd, F_OFD_SETLK, F_WRLCK, SEEK_SET, 12, 10));
		SEE(lock(other, F_OFD_SETLK, F_RDLCK, SEEK_SET, 20, 1));
		SEE(flock(other, LOCK_SH | LOCK_NB));
		SEE(flock(fd, LOCK_SH | LOCK_NB));
		SEE(flock(other, LOCK_SH | LOCK_NB));
		close(fd);
	});
	held("grown by the child", other, F_OFD_GETLK, F_WRLCK, 0, 0);
	SEE(flock(fd, LOCK_EX | LOCK_NB));
	int twin = dup(fd);
	close(fd);
	held("still held", other, F_OFD_GETLK, F_WRLCK, 0, 0);
	close(twin);
	held("gone", other, F_OFD_GETLK, F_WRLCK, 0, 0);
	SEE(flock(other, LOCK_EX | LOCK_NB));
	close(other);
}

static volatile sig_atomic_t rang;
static volatile int lets_go = -1;
static void on_alarm(int signal)
{
	(void)signal;
	rang++;
	if (lets_go >= 0)
		write(lets_go, "x", 1);
}

/* Whoever holds the lock gives it up when a handler says so that runs while the lock is awaited. */
static void told_by_a_handler(int kind)
{
	int ready[2], go[2], status;
	char byte;
	pipe(ready), pipe(go);
	struct sigaction action = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
	sigaction(SIGALRM, &action, NULL);
	fflush(stdout);
	pid_t child = fork();
	if (child == 0) {
		int own = open(path, O_RDWR);
		kind == F_SETLKW ? lock(own, F_SETLK, F_WRLCK, SEEK_SET, 0, 0) : flock(own, LOCK_EX);
		write(ready[1], "x", 1);
		read(go[0], &byte, 1);
		_exit(0);
	}
	read(ready[0], &byte, 1);
	int fd = open(path, O_RDWR);
	struct itimerval soon = {{0, 20000}, {0, 20000}}, never = {0};
	lets_go = go[1];
	setitimer(ITIMER_REAL, &soon, NULL);
	SEE(kind == F_SETLKW ? lock(fd, F_SETLKW, F_RDLCK, SEEK_SET, 0, 0) : flock(fd, LOCK_SH));
	setitimer(ITIMER_REAL, &never, NULL);
	lets_go = -1;
	see("rang", rang > 0);
	waitpid(child, &status, 0);
	see("the holder's status", status);
	close(fd);
}

/* A signal just before or just after the wait begins ends it all the same. */
static void interrupted_at_any_time(void)
{
	int fd = open(path, O_RDWR), other = open(path, O_RDWR), interrupted = 0;
	struct sigaction action = {.sa_handler = on_alarm};
	sigaction(SIGALRM, &action, NULL);
	flock(fd, LOCK_EX);
	for (int i = 0; i < 200; i++) {
		struct itimerval soon = {{0, 5000}, {0, 1 + i % 50}}, never = {0};
		setitimer(ITIMER_REAL, &soon, NULL);
		interrupted += flock(other, LOCK_SH) == -1 && errno == EINTR;
		setitimer(ITIMER_REAL, &never, NULL);
	}
	see("interrupted", interrupted);
	errno = 0;
	close(fd), close(other);
}

/* The locks of a process that was killed are free before its parent has looked at it. */
static void killed(int signal)
{
	int ready[2], status;
	char byte;
	pipe(ready);
	int shared = open(path, O_RDWR), fd = open(path, O_RDWR);
	fflush(stdout);
	pid_t holder = fork();
	if (holder == 0) {
		lock(shared, F_SETLK, F_WRLCK, SEEK_SET, 0, 0);
		flock(shared, LOCK_EX);
		write(ready[1], "x", 1);
		for (;;)
			pause();
	}
	close(shared);
	read(ready[0], &byte, 1);
	pid_t killer = fork();
	if (killer == 0) {
		usleep(20000);
		_exit(kill(holder, signal));
	}
	SEE(lock(fd, F_SETLKW, F_WRLCK, SEEK_SET, 0, 0));
	SEE(flock(fd, LOCK_EX));
	waitpid(holder, &status, 0);
	see("killed by", WTERMSIG(status));
	waitpid(killer, &status, 0);
	close(fd);
}

static void waiting(void)
{
	int fd = open(path, O_RDWR), ready[2], go[2];
	char byte;
	pipe(ready), pipe(go);
	struct sigaction action = {.sa_handler = on_alarm};
	sigaction(SIGALRM, &action, NULL);
	fflush(stdout);
	pid_t child = fork();
	if (child == 0) {
		lock(fd, F_SETLK, F_WRLCK, SEEK_SET, 0, 10);
		write(ready[1], "x", 1);
		read(go[0], &byte, 1);
		/* The parent waits for us: a circle, and one of both is told. */
		int result = lock(fd, F_SETLKW, F_WRLCK, SEEK_SET, 50, 10);
		_exit(result == 0 ? 4 : errno == EDEADLK ? 3 : 5);
	}
	read(ready[0], &byte, 1);
	struct itimerval soon = {{0, 20000}, {0, 20000}}, never = {0};
	setitimer(ITIMER_REAL, &soon, NULL);
	SEE(lock(fd, F_SETLKW, F_WRLCK, SEEK_SET, 0, 10));
	setitimer(ITIMER_REAL, &never, NULL);
	see("rang", rang > 0);
	lock(fd, F_SETLK, F_WRLCK, SEEK_SET, 50, 10);
	write(go[1], "x", 1);
	int told = lock(fd, F_SETLKW, F_WRLCK, SEEK_SET, 0, 10) != 0 && errno == EDEADLK;
	if (told)
		lock(fd, F_SETLK, F_UNLCK, SEEK_SET, 50, 10);
	int status;
	waitpid(child, &status, 0);
	see("told of the deadlock", told + (WEXITSTATUS(status) == 3));
	/* A handler with SA_RESTART does not end the wait. */
	action.sa_flags = SA_RESTART, rang = 0;
	sigaction(SIGALRM, &action, NULL);
	fflush(stdout);
	child = fork();
	if (child == 0) {
		int own = open(path, O_RDWR);
		flock(own, LOCK_EX);
		write(ready[1], "x", 1);
		read(go[0], &byte, 1);
		_exit(0);
	}
	read(ready[0], &byte, 1);
	pid_t helper = fork();
	if (helper == 0) {
		for (int i = 0; i < 5; i++)
			usleep(20000), kill(getppid(), SIGALRM);
		usleep(20000);
		write(go[1], "x", 1);
		_exit(0);
	}
	SEE(flock(fd, LOCK_EX));
	see("rang", rang > 0);
	waitpid(child, &status, 0), waitpid(helper, &status, 0);
	/* The end of a process ends its locks. */
	fflush(stdout);
	lock(fd, F_SETLK, F_UNLCK, SEEK_SET, 0, 0);
	flock(fd, LOCK_UN);
	child = fork();
	if (child == 0) {
		lock(fd, F_SETLK, F_WRLCK, SEEK_SET, 0, 0);
		write(ready[1], "x", 1);
		pause();
	}
	read(ready[0], &byte, 1);
	SEE(lock(fd, F_SETLK, F_WRLCK, SEEK_SET, 0, 0));
	kill(child, SIGTERM);
	waitpid(child, &status, 0);
	SEE(lock(fd, F_SETLK, F_WRLCK, SEEK_SET, 0, 0));
	close(fd);
}

static void executed(void)
{
	int own = open(path, O_RDWR);
	IN_CHILD(held("the program's", own, F_GETLK, F_WRLCK, 0, 10));
	SEE(lock(own, F_SETLK, F_WRLCK, SEEK_SET, 0, 10));
	held("the open file's", own, F_OFD_GETLK, F_WRLCK, 20, 10);
	SEE(flock(own, LOCK_EX | LOCK_NB));
}

int main(int count, char **arguments)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	path = arguments[1];
	parent = getpid();
	if (count > 2) {
		executed();
		printf("done\n");
		return 0;
	}
	ranges();
	open_files();
	waiting();
	told_by_a_handler(F_SETLKW);
	told_by_a_handler(LOCK_EX);
	interrupted_at_any_time();
	killed(SIGTERM);
	killed(SIGKILL);
	int fd = open(path, O_RDWR);
	lock(fd, F_SETLK, F_WRLCK, SEEK_SET, 0, 10);
	lock(fd, F_OFD_SETLK, F_WRLCK, SEEK_SET, 20, 10);
	flock(fd, LOCK_SH);
	execl(arguments[0], arguments[0], path, "again", (char *)NULL);
	return 1;
}
