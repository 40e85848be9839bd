/*
 * The times of a file from one program to the next. The same runs must print the same lines on an
 * ordinary file on ext4 and on a protected file.
 *
 * Usage: times PATH set|write|kill|show.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "observe.h"

static struct timespec now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_REALTIME_COARSE, &time);
	return time;
}

static int later(struct timespec a, struct timespec b)
{
	return a.tv_sec != b.tv_sec ? a.tv_sec > b.tv_sec : a.tv_nsec > b.tv_nsec;
}

/* Writes the moment before it into the file. */
static void put(int fd)
{
	struct timespec before = now();
	SEE(pwrite(fd, &before, sizeof before, 0));
}

int main(int argc, char **argv)
{
	struct timespec start = now(), before = {0};
	struct stat st;
	int fd = open(argv[1], O_RDWR);
	fstat(fd, &st);
	see("mode", st.st_mode & 07777);
	if (!strcmp(argv[2], "set")) {
		struct timespec times[2] = {{1000, 5}, {2000, 7}};
		SEE(futimens(fd, times));
		times[0].tv_nsec = UTIME_OMIT, times[1].tv_sec = 3000;
		SEE(utimensat(AT_FDCWD, argv[1], times, 0));
		times[1].tv_nsec = 1000000000;
		SEE(futimens(fd, times));
		SEE(fsync(fd));
	} else if (!strcmp(argv[2], "write")) {
		put(fd);
	} else if (!strcmp(argv[2], "kill")) {
		put(fd);
		SEE(fsync(fd));
		kill(getpid(), SIGKILL);
	} else if (pread(fd, &before, sizeof before, 0) == sizeof before && before.tv_sec > 1000000) {
		see("content changed after it was written", !later(before, st.st_mtim));
		see("and not by this program", !later(st.st_mtim, start));
		see("changed with it", !memcmp(&st.st_mtim, &st.st_ctim, sizeof st.st_mtim));
	} else {
		see("access", st.st_atim.tv_sec * 10 + st.st_atim.tv_nsec);
		see("content", st.st_mtim.tv_sec * 10 + st.st_mtim.tv_nsec);
		see("changed since", later(st.st_ctim, st.st_mtim) && !later(st.st_ctim, start));
	}
	fstat(fd, &st);
	see("size", st.st_size);
	close(fd);
	puts("done");
	return 0;
}
