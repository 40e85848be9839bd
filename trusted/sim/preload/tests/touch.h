/*
 * Mapped memory: the call, and what touching it raises. After observe.h; `on_fault` is for SIGSEGV
 * and SIGBUS.
 */
#include <setjmp.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#define MAP(...) (errno = 0, see("mmap(" #__VA_ARGS__ ")", mmap(__VA_ARGS__) == MAP_FAILED ? -1 : 0))

static sigjmp_buf back;
static void on_fault(int signal)
{
	siglongjmp(back, signal);
}

/* The signal that touching `at` raises, or the byte there. */
static void touch(const char *what, volatile char *at, int writes)
{
	int signal = sigsetjmp(back, 1);
	if (signal)
		printf("%s: %s\n", what, sigabbrev_np(signal));
	else if (writes)
		*at = 1, printf("%s: written\n", what);
	else
		printf("%s: byte %d\n", what, *at);
}
