/*
 * Observations: one printed line for each, so that two runs of a program can be compared.
 * Everything is written out at once: a process that forks or is killed leaves nothing behind.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>

/* What was done, the value, and errno when the value is -1. */
static void see(const char *what, long value)
{
	int error = errno;
	if (value == -1)
		printf("%s: -1 %s\n", what, strerrorname_np(error));
	else
		printf("%s: %ld\n", what, value);
	fflush(stdout);
	errno = 0;
}
#define SEE(call) (errno = 0, see(#call, (long)(call)))
