/*
 * A timer's handler that hits file and AIO calls in the middle: in the first half it makes such
 * calls itself, in the second it jumps out. Everything must work afterwards. Prints the same lines
 * on an ordinary file on ext4 and on a protected file.
 *
 * Usage: handlers PATH SIGNALS
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <libaio.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <unistd.h>

#define BLOCK 4096

static sigjmp_buf out;
static volatile int jumps;
static volatile long signals;
static int fd;
static io_context_t own;
static char block[BLOCK] __attribute__((aligned(BLOCK)));

static void fail(const char *what, long value)
{
	printf("%s: %ld, errno %d\n", what, value, errno);
	_exit(9);
}

static void on_signal(int signal, siginfo_t *info, void *context)
{
	int before = errno;
	if (info->si_code != SI_KERNEL)
		fail("si_code", info->si_code);
	signals++;
	if (jumps)
		siglongjmp(out, 1);
	if (pread(fd, block, BLOCK, 0) != BLOCK)
		fail("pread in the handler", 0);
	if (signals % 4 == 0 && pwrite(fd, block, BLOCK, 0) != BLOCK)
		fail("pwrite in the handler", 0);
	if (signals % 3 == 0) {
		struct iocb request, *list[] = {&request};
		struct io_event event;
		io_prep_pread(&request, fd, block, BLOCK, BLOCK);
		if (io_submit(own, 1, list) != 1)
			fail("io_submit in the handler", 0);
		if (io_getevents(own, 1, 1, &event, NULL) != 1 || event.res != BLOCK)
			fail("io_getevents in the handler", 0);
	}
	errno = before;
}

static void clock_at(long microseconds)
{
	struct itimerval timer = {{0, microseconds}, {0, microseconds}};
	setitimer(ITIMER_REAL, &timer, NULL);
}

/* One request, waited for; what a jump left behind is reaped. */
static void request(io_context_t context, char *data)
{
	struct iocb request, *list[] = {&request};
	struct io_event events[64];
	struct timespec none = {0, 0};
	io_prep_pread(&request, fd, data, BLOCK, 2 * BLOCK);
	long made = syscall(SYS_io_submit, context, 1, list);
	if (made == 1) {
		made = syscall(SYS_io_getevents, context, 1, 8, events, NULL);
		if (made < 0 && errno != EINTR)
			fail("io_getevents", made);
	} else if (made < 0 && errno == EAGAIN) {
		while (syscall(SYS_io_getevents, context, 0, 64, events, &none) > 0)
			;
	} else {
		fail("io_submit", made);
	}
	if (pread(fd, data, BLOCK, BLOCK) != BLOCK)
		fail("pread", 0);
}

int main(int count, char **arguments)
{
	if (count != 3)
		return 2;
	setvbuf(stdout, NULL, _IOLBF, 0);
	long wanted = atol(arguments[2]);
	char *data = aligned_alloc(BLOCK, 16 * BLOCK);
	memset(data, 'z', 16 * BLOCK);
	memset(block, 'z', BLOCK);
	fd = open(arguments[1], O_RDWR | O_CREAT | O_DIRECT, 0600);
	if (pwrite(fd, data, 16 * BLOCK, 0) != 16 * BLOCK || io_setup(8, &own) != 0)
		fail("before", 0);
	struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
	sigaction(SIGALRM, &action, NULL);
	struct sigaction now;
	sigaction(SIGALRM, NULL, &now);
	printf("handler %d, flags %d\n", now.sa_sigaction == on_signal, now.sa_flags & (SA_SIGINFO | SA_RESTART));
	for (jumps = 0; jumps < 2; jumps++) {
		static io_context_t context;
		context = NULL;
		signals = 0;
		if (io_setup(1024, &context) != 0)
			fail("io_setup", 0);
		clock_at(300);
		sigsetjmp(out, 1);
		while (signals < wanted) {
			request(context, data);
		}
		clock_at(0);
		printf("io_destroy: %d\n", io_destroy(context));
	}
	/* The mask is as it was, and the wait of a signal that only io_pgetevents lets through ends. */
	sigset_t set;
	sigprocmask(SIG_SETMASK, NULL, &set);
	printf("blocked: %d\n", sigismember(&set, SIGALRM));
	jumps = 0;
	sigaddset(&set, SIGALRM);
	sigprocmask(SIG_SETMASK, &set, NULL);
	clock_at(1000);
	sigdelset(&set, SIGALRM);
	struct io_event event;
	long before = signals;
	printf("io_pgetevents: %d\n", io_pgetevents(own, 1, 1, &event, NULL, &set));
	clock_at(0);
	printf("handled: %d\n", signals > before);
	sigprocmask(SIG_SETMASK, NULL, &set);
	printf("blocked: %d\n", sigismember(&set, SIGALRM));
	printf("close: %d\n", close(fd));
	fd = open(arguments[1], O_RDONLY);
	printf("read: %ld\n", (long)pread(fd, data, BLOCK, 3 * BLOCK));
	printf("its byte: %d\n", data[17]);
	puts("done");
	return 0;
}
