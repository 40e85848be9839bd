/*
 * POSIX AIO (aio_read and its kin) on one path. Prints a line for every observation; the same
 * program must print the same lines on an ordinary file on ext4 and on a protected file.
 *
 * Usage: posixaio PATH. The file exists; its content and size do not matter.
 */
#define _GNU_SOURCE
#include <aio.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "observe.h"

#define BLOCK 4096
#define MANY 64

static const char *path;
static char *page; /* MANY blocks, aligned */
static void *no_access;

static struct aiocb request(int fd, void *data, size_t length, off_t offset)
{
	struct aiocb made;
	memset(&made, 0, sizeof made);
	made.aio_fildes = fd;
	made.aio_buf = data;
	made.aio_nbytes = length;
	made.aio_offset = offset;
	made.aio_sigevent.sigev_notify = SIGEV_NONE;
	return made;
}

static void finish(struct aiocb *cb)
{
	const struct aiocb *list[1] = {cb};
	while (aio_error(cb) == EINPROGRESS)
		aio_suspend(list, 1, NULL);
}

/* How a submitted request ended. */
static void ended(const char *what, struct aiocb *cb)
{
	finish(cb);
	int error = aio_error(cb);
	printf("%s: error %s, ", what, error ? strerrorname_np(error) : "none");
	errno = 0;
	see("return", aio_return(cb));
}

static void plain(int fd)
{
	struct aiocb cb = request(fd, page, 3 * BLOCK, 100);
	memset(page, 'w', 3 * BLOCK);
	SEE(aio_write(&cb));
	ended("write", &cb);
	see("opcode", cb.aio_lio_opcode);
	memset(page, 0, 3 * BLOCK);
	cb = request(fd, page, 3 * BLOCK, 100);
	SEE(aio_read(&cb));
	ended("read", &cb);
	see("first byte", page[0]);
	see("last byte", page[3 * BLOCK - 1]);
	see("opcode", cb.aio_lio_opcode);
	see("asked twice", aio_return(&cb));
	cb = request(fd, page, BLOCK, 3 * BLOCK);
	SEE(aio_read(&cb));
	ended("read over the end", &cb);
	cb = request(fd, page, BLOCK, 50 * BLOCK);
	SEE(aio_read(&cb));
	ended("read beyond the end", &cb);
	cb = request(fd, page, 0, 0);
	SEE(aio_read(&cb));
	ended("read of nothing", &cb);
	SEE(aio_fsync(O_SYNC, &cb));
	ended("fsync", &cb);
	SEE(aio_fsync(O_DSYNC, &cb));
	ended("fdatasync", &cb);
	cb.aio_reqprio = -7;
	SEE(aio_fsync(O_DSYNC, &cb));
	ended("fdatasync with a priority", &cb);
	see("its priority", cb.aio_reqprio);
	see("position stays", lseek(fd, 0, SEEK_CUR));
}

static void refusals(int fd)
{
	struct aiocb cb = request(fd, page, BLOCK, -1);
	SEE(aio_read(&cb));
	ended("negative offset", &cb);
	cb = request(fd, page, BLOCK, -1);
	SEE(aio_write(&cb));
	ended("negative offset", &cb);
	cb = request(fd, page, BLOCK, 0), cb.aio_reqprio = -1;
	SEE(aio_read(&cb));
	ended("negative priority", &cb);
	cb = request(fd, page, BLOCK, 0), cb.aio_reqprio = 21;
	SEE(aio_write(&cb));
	ended("high priority", &cb);
	cb = request(fd, page, BLOCK, 0), cb.aio_reqprio = 20;
	SEE(aio_read(&cb));
	ended("highest priority", &cb);
	cb = request(fd, page, SIZE_MAX, 0);
	SEE(aio_read(&cb));
	ended("more than there is", &cb);
	cb = request(fd, no_access, BLOCK, 0);
	SEE(aio_read(&cb));
	ended("read without memory", &cb);
	cb = request(fd, no_access, BLOCK, 0);
	SEE(aio_write(&cb));
	ended("write without memory", &cb);
	cb = request(fd, page, BLOCK, INT64_MAX);
	SEE(aio_read(&cb));
	ended("at the highest offset", &cb);
	SEE(aio_fsync(0, &cb));
	SEE(aio_fsync(O_RDWR, &cb));
	int reader = open(path, O_RDONLY), writer = open(path, O_WRONLY);
	cb = request(reader, page, BLOCK, 0);
	SEE(aio_write(&cb));
	ended("write on a reader", &cb);
	SEE(aio_fsync(O_SYNC, &cb));
	finish(&cb);
	cb = request(writer, page, BLOCK, 0);
	SEE(aio_read(&cb));
	ended("read on a writer", &cb);
	SEE(aio_fsync(O_SYNC, &cb));
	ended("fsync on a writer", &cb);
	close(reader), close(writer);
	SEE(aio_read(&cb));
	ended("closed", &cb);
	SEE(aio_fsync(O_SYNC, &cb));
	SEE(aio_cancel(writer, NULL));
	SEE(aio_cancel(-1, NULL));
	int direct = open(path, O_RDWR | O_DIRECT);
	cb = request(direct, page + 1, BLOCK, 0);
	SEE(aio_read(&cb));
	ended("misaligned memory", &cb);
	cb = request(direct, page, BLOCK, 512);
	SEE(aio_write(&cb));
	ended("aligned", &cb);
	cb = request(direct, page, 100, 0);
	SEE(aio_write(&cb));
	ended("misaligned length", &cb);
	close(direct);
	int nothing = open(path, O_PATH);
	cb = request(nothing, page, BLOCK, 0);
	SEE(aio_read(&cb));
	ended("O_PATH", &cb);
	SEE(aio_fsync(O_SYNC, &cb));
	close(nothing);
}

static void appending(void)
{
	int fd = open(path, O_RDWR | O_TRUNC | O_APPEND);
	static struct aiocb all[MANY];
	for (int i = 0; i < MANY; i++) {
		page[i] = (char)('A' + i % 26);
		all[i] = request(fd, page + i, 1, 12345 - i);
		if (aio_write(&all[i]) != 0)
			see("append", -1);
	}
	for (int i = 0; i < MANY; i++)
		finish(&all[i]);
	memset(page, 0, MANY);
	see("size", lseek(fd, 0, SEEK_END));
	SEE(pread(fd, page, MANY, 0));
	long wrong = 0;
	for (int i = 0; i < MANY; i++)
		wrong += page[i] != 'A' + i % 26;
	see("out of order", wrong);
	close(fd);
}

/* Requests that overlap take effect in the order in which they were made. */
static void overlapping(int fd)
{
	static struct aiocb all[MANY];
	char *data = aligned_alloc(BLOCK, MANY * BLOCK);
	char *seen = aligned_alloc(BLOCK, MANY * BLOCK);
	for (int i = 0; i < MANY; i += 2) {
		memset(data + i * BLOCK, 'a' + i / 2 % 26, BLOCK);
		all[i] = request(fd, data + i * BLOCK, BLOCK, 8 * BLOCK + i);
		all[i + 1] = request(fd, seen + i * BLOCK, BLOCK, 8 * BLOCK + i);
		if (aio_write(&all[i]) != 0 || aio_read(&all[i + 1]) != 0)
			see("overlapping", -1);
	}
	long wrong = 0;
	for (int i = 0; i < MANY; i++)
		finish(&all[i]);
	for (int i = 0; i < MANY; i += 2)
		wrong += memcmp(data + i * BLOCK, seen + i * BLOCK, BLOCK) != 0;
	see("out of order", wrong);
	for (int i = 0; i < MANY; i += 2)
		aio_write(&all[i]);
	SEE(aio_fsync(O_SYNC, &all[1]));
	finish(&all[1]);
	for (int i = 0; i < MANY; i += 2)
		wrong += aio_error(&all[i]) == EINPROGRESS;
	see("not waited for by fsync", wrong);
	free(data), free(seen);
}

static void cancelling(int fd)
{
	struct aiocb cb = request(fd, page, BLOCK, 0);
	SEE(aio_cancel(fd, NULL) == AIO_ALLDONE);
	SEE(aio_cancel(fd, &cb) == AIO_ALLDONE);
	SEE(aio_read(&cb));
	finish(&cb);
	SEE(aio_cancel(fd, &cb) == AIO_ALLDONE);
	ended("after that", &cb);
	cb.aio_fildes = fd + 1;
	SEE(aio_cancel(fd, &cb));
	/* Whatever is answered, the request ends as it says. */
	long wrong = 0;
	static struct aiocb all[MANY];
	for (int i = 0; i < MANY; i++) {
		all[i] = request(fd, page + i * BLOCK, BLOCK, i * (off_t)BLOCK);
		aio_write(&all[i]);
	}
	for (int i = MANY - 1; i >= 0; i--) {
		int answer = aio_cancel(fd, &all[i]);
		if (answer == AIO_CANCELED)
			wrong += aio_error(&all[i]) != ECANCELED || aio_return(&all[i]) != -1;
		else if (answer != AIO_NOTCANCELED && answer != AIO_ALLDONE)
			wrong++;
		finish(&all[i]);
		if (answer != AIO_CANCELED)
			wrong += aio_error(&all[i]) != 0 || aio_return(&all[i]) != BLOCK;
	}
	see("wrong answers of aio_cancel", wrong);
	see("all done", aio_cancel(fd, NULL) == AIO_ALLDONE);
}

static volatile sig_atomic_t arrived, code, number;
static void *volatile pointer;
static volatile pid_t sender;
static void on_signal(int signal, siginfo_t *info, void *context)
{
	(void)context;
	number = signal, code = info->si_code, pointer = info->si_value.sival_ptr;
	sender = info->si_pid;
	arrived++;
}

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t condition = PTHREAD_COND_INITIALIZER;
static int called;
static pthread_t caller;
static void *passed;
static size_t stack_size;
static void on_thread(union sigval value)
{
	pthread_attr_t attributes;
	pthread_mutex_lock(&mutex);
	caller = pthread_self();
	passed = value.sival_ptr;
	if (pthread_getattr_np(caller, &attributes) == 0) {
		pthread_attr_getstacksize(&attributes, &stack_size);
		pthread_attr_destroy(&attributes);
	}
	called++;
	pthread_cond_signal(&condition);
	pthread_mutex_unlock(&mutex);
}

static void await_calls(int calls)
{
	pthread_mutex_lock(&mutex);
	while (called < calls)
		pthread_cond_wait(&condition, &mutex);
	pthread_mutex_unlock(&mutex);
}

static void await_signals(int signals)
{
	sigset_t blocked, before;
	sigfillset(&blocked);
	sigprocmask(SIG_BLOCK, &blocked, &before);
	while (arrived < signals)
		sigsuspend(&before);
	sigprocmask(SIG_SETMASK, &before, NULL);
}

static void notices(int fd)
{
	struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
	sigaction(SIGUSR1, &action, NULL);
	sigaction(SIGRTMIN, &action, NULL);
	struct aiocb cb = request(fd, page, BLOCK, 0);
	cb.aio_sigevent.sigev_notify = SIGEV_SIGNAL;
	cb.aio_sigevent.sigev_signo = SIGUSR1;
	cb.aio_sigevent.sigev_value.sival_ptr = &cb;
	SEE(aio_read(&cb));
	await_signals(1);
	see("signal", number == SIGUSR1);
	see("si_code", code == SI_ASYNCIO);
	see("si_value", pointer == &cb);
	see("si_pid", sender == getpid());
	see("done when the signal comes", aio_error(&cb));
	see("return", aio_return(&cb));
	arrived = 0;
	static struct aiocb all[MANY];
	for (int i = 0; i < MANY; i++) {
		all[i] = request(fd, page + i * BLOCK, BLOCK, i * (off_t)BLOCK);
		all[i].aio_sigevent.sigev_notify = SIGEV_SIGNAL;
		all[i].aio_sigevent.sigev_signo = SIGRTMIN;
		if (aio_read(&all[i]) != 0)
			see("read", -1);
	}
	await_signals(MANY);
	see("queued signals", arrived);
	cb = request(fd, no_access, BLOCK, 0);
	cb.aio_sigevent.sigev_notify = SIGEV_THREAD;
	cb.aio_sigevent.sigev_notify_function = on_thread;
	cb.aio_sigevent.sigev_value.sival_ptr = &cb;
	SEE(aio_read(&cb));
	await_calls(1);
	see("in a thread of its own", !pthread_equal(caller, pthread_self()));
	see("its value", passed == &cb);
	ended("failed", &cb);
	pthread_attr_t attributes;
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 1 << 20);
	cb = request(fd, page, BLOCK, 0);
	cb.aio_sigevent.sigev_notify = SIGEV_THREAD;
	cb.aio_sigevent.sigev_notify_function = on_thread;
	cb.aio_sigevent.sigev_notify_attributes = &attributes;
	SEE(aio_fsync(O_SYNC, &cb));
	await_calls(2);
	see("its stack", (long)stack_size);
	ended("fsync", &cb);
	cb.aio_sigevent.sigev_notify = 77;
	SEE(aio_fsync(O_SYNC, &cb));
	ended("unknown notice", &cb);
	arrived = 0;
	cb.aio_sigevent.sigev_notify = SIGEV_SIGNAL;
	cb.aio_sigevent.sigev_signo = 99;
	SEE(aio_fsync(O_SYNC, &cb));
	ended("signal that there is not", &cb);
}

static void lists(int fd)
{
	static struct aiocb all[MANY];
	struct aiocb *list[MANY];
	struct sigevent event;
	int ends[2];
	memset(&event, 0, sizeof event);
	arrived = called = 0;
	for (int i = 0; i < MANY; i++) {
		memset(page + i * BLOCK, 'a' + i % 26, BLOCK);
		all[i] = request(fd, page + i * BLOCK, BLOCK, i * (off_t)BLOCK);
		all[i].aio_lio_opcode = LIO_WRITE;
		list[i] = &all[i];
	}
	list[3] = NULL;
	all[5].aio_lio_opcode = LIO_NOP;
	SEE(lio_listio(LIO_WAIT, list, MANY, NULL));
	long wrong = 0;
	for (int i = 0; i < MANY; i++)
		if (i != 3 && i != 5)
			wrong += aio_error(&all[i]) != 0 || aio_return(&all[i]) != BLOCK;
	see("wrong results", wrong);
	see("size", lseek(fd, 0, SEEK_END));
	all[7].aio_offset = -1;
	SEE(lio_listio(LIO_WAIT, list, MANY, NULL));
	ended("bad one", &all[7]);
	ended("good one", &all[8]);
	all[7].aio_offset = 0, all[7].aio_reqprio = -1;
	SEE(lio_listio(LIO_WAIT, list, 10, NULL));
	ended("bad one", &all[7]);
	ended("good one", &all[8]);
	SEE(lio_listio(LIO_NOWAIT, list, 10, NULL));
	for (int i = 0; i < 10; i++)
		if (list[i] && i != 5)
			finish(list[i]);
	ended("bad one", &all[7]);
	ended("good one", &all[8]);
	all[7].aio_reqprio = 0, all[7].aio_lio_opcode = 9;
	SEE(lio_listio(LIO_WAIT, list, 10, NULL));
	ended("unknown operation", &all[7]);
	all[7].aio_lio_opcode = LIO_READ;
	event.sigev_notify = SIGEV_SIGNAL;
	event.sigev_signo = SIGRTMIN;
	event.sigev_value.sival_ptr = &event;
	SEE(lio_listio(LIO_NOWAIT, list, MANY, &event));
	await_signals(1);
	see("si_code", code == SI_ASYNCIO);
	see("si_value", pointer == &event);
	wrong = 0;
	for (int i = 0; i < MANY; i++)
		if (list[i] && i != 5)
			wrong += aio_error(&all[i]) != 0;
	see("not done when the signal comes", wrong);
	see("signals", arrived);
	SEE(lio_listio(LIO_NOWAIT, list + 3, 1, &event));
	await_signals(2);
	see("signal for nothing to do", arrived);
	SEE(lio_listio(LIO_NOWAIT, NULL, 0, NULL));
	SEE(lio_listio(LIO_WAIT, NULL, 0, NULL));
	SEE(lio_listio(7, list, 1, NULL));
	event.sigev_notify = SIGEV_THREAD;
	event.sigev_notify_function = on_thread;
	SEE(lio_listio(LIO_NOWAIT, list, MANY, &event));
	await_calls(1);
	see("passed", passed == &event);
	/* One list for this file and for a pipe. */
	pipe(ends);
	write(ends[1], "piped", 5);
	char piped[8] = {0};
	all[1] = request(ends[0], piped, 5, 0);
	all[1].aio_lio_opcode = LIO_READ;
	SEE(lio_listio(LIO_WAIT, list, 3, NULL));
	printf("%s\n", piped);
	ended("pipe", &all[1]);
	ended("file", &all[2]);
	write(ends[1], "again", 5);
	called = arrived = 0;
	SEE(lio_listio(LIO_NOWAIT, list, 3, &event));
	await_calls(1);
	printf("%s\n", piped);
	ended("pipe", &all[1]);
	ended("file", &all[2]);
	/* Waiting for a file and for a pipe that stays empty, then for a pipe that does not. */
	struct aiocb slow = request(ends[0], piped, 5, 0);
	SEE(aio_read(&slow));
	struct aiocb quick = request(fd, page, BLOCK, 0);
	SEE(aio_read(&quick));
	const struct aiocb *both[3] = {&slow, NULL, &quick};
	while (aio_error(&quick) == EINPROGRESS)
		if (aio_suspend(both, 3, NULL) != 0)
			see("suspend", -1);
	see("the pipe", aio_error(&slow) == EINPROGRESS);
	struct timespec soon = {0, 1000000};
	SEE(aio_suspend(both, 2, &soon));
	write(ends[1], "third", 5);
	SEE(aio_suspend(both, 2, NULL));
	ended("pipe", &slow);
	close(ends[0]), close(ends[1]);
}

static void *sends(void *thread)
{
	while (!arrived) {
		pthread_kill(*(pthread_t *)thread, SIGUSR2);
		usleep(1000);
	}
	return NULL;
}

static void suspending(int fd)
{
	struct aiocb cb = request(fd, page, BLOCK, 0);
	const struct aiocb *list[2] = {&cb, NULL};
	struct timespec none = {0, 0}, bad = {0, 2000000000}, negative = {-1, 0};
	SEE(aio_read(&cb));
	finish(&cb);
	SEE(aio_suspend(list, 1, NULL));
	SEE(aio_suspend(list, 2, NULL));
	SEE(aio_suspend(list, 1, &none));
	SEE(aio_suspend(list, -1, NULL));
	SEE(aio_suspend(list + 1, 1, &none));
	SEE(aio_suspend(list, 0, &none));
	SEE(aio_suspend(list + 1, 1, &bad));
	SEE(aio_suspend(list + 1, 1, &negative));
	struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO};
	sigaction(SIGUSR2, &action, NULL);
	arrived = 0;
	pthread_t self = pthread_self(), thread;
	pthread_create(&thread, NULL, sends, &self);
	SEE(aio_suspend(list + 1, 1, NULL));
	pthread_join(thread, NULL);
	see("handled", arrived > 0);
}

static void *from_a_thread(void *at)
{
	struct aiocb *cb = at;
	for (int round = 0; round < 50; round++) {
		if (aio_read(cb) != 0)
			return "submit";
		finish(cb);
		if (aio_return(cb) != BLOCK)
			return "result";
	}
	return NULL;
}

static void others(int fd)
{
	pthread_t threads[4];
	struct aiocb all[4];
	long wrong = 0;
	for (int i = 0; i < 4; i++) {
		all[i] = request(fd, page + i * BLOCK, BLOCK, i * BLOCK);
		pthread_create(&threads[i], NULL, from_a_thread, &all[i]);
	}
	for (int i = 0; i < 4; i++) {
		void *result;
		pthread_join(threads[i], &result);
		wrong += result != NULL;
	}
	see("threads that failed", wrong);
	struct aiocb cb;
	/* A request outlives the descriptor it was made with. */
	memset(page, 'z', BLOCK);
	int other = open(path, O_RDWR);
	cb = request(other, page, BLOCK, 0);
	SEE(aio_fsync(O_SYNC, &cb));
	finish(&cb);
	SEE(aio_write(&cb));
	finish(&cb);
	close(other);
	ended("after close", &cb);
	SEE(pread(fd, page, BLOCK, 0));
	see("its byte", page[9]);
}

int main(int count, char **arguments)
{
	if (count != 2)
		return 2;
	setvbuf(stdout, NULL, _IOLBF, 0);
	path = arguments[1];
	page = aligned_alloc(BLOCK, MANY * BLOCK);
	memset(page, 0, MANY * BLOCK);
	no_access = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int fd = open(path, O_RDWR | O_TRUNC);
	plain(fd);
	refusals(fd);
	appending();
	overlapping(fd);
	cancelling(fd);
	notices(fd);
	lists(fd);
	suspending(fd);
	others(fd);
	close(fd);
	printf("done\n");
	return 0;
}
