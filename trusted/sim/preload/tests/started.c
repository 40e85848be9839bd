/*
 * Where a filter that raises SIGSYS kills: the signal blocked, ignored, or in a handler with a full
 * mask; children by posix_spawn, system, vfork; programs that are started; POSIX AIO's threads.
 * Prints the same lines natively and under the launcher's filter.
 *
 * Usage: started PATH DIRECTORY (absolute; the directory is an ordinary one).
 */
#define _GNU_SOURCE
#include <aio.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;
static char ordinary[4096];
static volatile int opened;

static int ended(pid_t child)
{
	int status = 0;
	waitpid(child, &status, 0);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

static int opens(void)
{
	int fd = open(ordinary, O_RDWR | O_CREAT, 0600);
	FILE *f = fopen(ordinary, "r");
	int both = fd >= 0 && f != NULL;
	close(fd);
	fclose(f);
	return both;
}

static void on_signal(int signal)
{
	opened = opens();
}

int main(int count, char **arguments)
{
	if (count != 3)
		return 2;
	setvbuf(stdout, NULL, _IOLBF, 0);
	snprintf(ordinary, sizeof ordinary, "%s/ordinary", arguments[2]);
	int fd = open(arguments[1], O_RDWR | O_CREAT, 0600);
	printf("descriptor: %d\n", fd);
	close(0);
	printf("lowest descriptor: %d\n", open(arguments[1], O_RDWR));

	sigset_t all;
	sigfillset(&all);
	sigprocmask(SIG_BLOCK, &all, NULL);
	printf("opens with all signals blocked: %d\n", opens());
	printf("system: %d\n", WEXITSTATUS(system("exit 3")));
	pid_t child;
	char *shell[] = {"sh", "-c", "echo written; exit 5", NULL};
	posix_spawn_file_actions_t actions;
	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_addopen(&actions, 7, ordinary, O_WRONLY | O_TRUNC, 0);
	posix_spawn_file_actions_adddup2(&actions, 7, 1);
	printf("posix_spawn: %d\n", posix_spawn(&child, "/bin/sh", &actions, NULL, shell, environ));
	printf("its child: %d\n", ended(child));
	if ((child = vfork()) == 0) {
		execl("/bin/sh", "sh", "-c", "exit 6", (char *)NULL);
		_exit(1);
	}
	printf("vfork: %d\n", ended(child));
	sigprocmask(SIG_UNBLOCK, &all, NULL);

	signal(SIGSYS, SIG_IGN);
	printf("opens with SIGSYS ignored: %d\n", opens());
	struct sigaction action = {.sa_handler = on_signal, .sa_mask = all};
	sigaction(SIGUSR1, &action, NULL);
	raise(SIGUSR1);
	printf("opens in a handler: %d\n", opened);

	char data[10] = "unchanged";
	int file = open(ordinary, O_RDWR);
	struct aiocb request = {.aio_fildes = file, .aio_buf = data, .aio_nbytes = 7};
	const struct aiocb *list[] = {&request};
	printf("aio_read: %d\n", aio_read(&request));
	while (aio_error(&request) == EINPROGRESS)
		aio_suspend(list, 1, NULL);
	printf("its bytes: %ld %.7s\n", (long)aio_return(&request), data);

	child = fork();
	if (child == 0) {
		char *self[] = {"true", NULL};
		execv("/bin/true", self);
		_exit(1);
	}
	printf("fork and exec: %d\n", ended(child));
	puts("done");
	return 0;
}
