/*
 * Nanoseconds of single calls, the best of several rounds. One line each: name, nanoseconds.
 *
 * Usage: calls ORDINARY PROTECTED (absolute paths; both files exist)
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;
static int zero;
static FILE *stream;
static const char *ordinary, *protected;

static double now(void)
{
	struct timespec at;
	clock_gettime(CLOCK_MONOTONIC, &at);
	return at.tv_sec * 1e9 + at.tv_nsec;
}

static void measure(const char *name, long times, void (*call)(void))
{
	double best = 1e18;
	for (int round = 0; round < 7; round++) {
		double start = now();
		for (long i = 0; i < times; i++)
			call();
		double each = (now() - start) / times;
		if (each < best)
			best = each;
	}
	printf("%s\t%.1f\n", name, best);
}

static void parent(void) { getppid(); }
static void parent_by_number(void) { syscall(SYS_getppid); }

static void read_by_symbol(void)
{
	char byte;
	(void)!read(zero, &byte, 1);
}

static void read_in_stream(void) { fgetc(stream); }

static void open_by_symbol(void) { close(open(ordinary, O_RDONLY)); }
static void open_in_stream(void) { fclose(fopen(ordinary, "r")); }

static long instruction(long number, long a, long b, long c)
{
	long result;
	register long d asm("r10") = 0;
	register long f asm("r9") = 0;
	asm volatile("nop\n\tsyscall\n\tnop"
		     : "=a"(result)
		     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(d), "r"(f)
		     : "rcx", "r11", "memory");
	return result;
}

static void open_by_instruction(void) { instruction(SYS_close, instruction(SYS_openat, AT_FDCWD, (long)ordinary, O_RDONLY), 0, 0); }
static void parent_by_instruction(void) { instruction(SYS_getppid, 0, 0, 0); }

static void protected_stream(void) { fclose(fopen(protected, "r")); }

static void start(void)
{
	pid_t child;
	char *arguments[] = {"true", NULL};
	posix_spawn(&child, "/bin/true", NULL, NULL, arguments, environ);
	waitpid(child, NULL, 0);
}

int main(int count, char **arguments)
{
	if (count != 3)
		return 2;
	ordinary = arguments[1];
	protected = arguments[2];
	zero = open("/dev/zero", O_RDONLY);
	stream = fdopen(dup(zero), "r");
	setvbuf(stream, NULL, _IONBF, 0);
	measure("getppid", 200000, parent);
	measure("syscall(SYS_getppid)", 200000, parent_by_number);
	measure("getppid, own instruction", 200000, parent_by_instruction);
	measure("read of 1 byte, /dev/zero", 200000, read_by_symbol);
	measure("fgetc unbuffered, /dev/zero", 200000, read_in_stream);
	measure("open and close", 20000, open_by_symbol);
	measure("fopen and fclose", 20000, open_in_stream);
	measure("openat and close, own instructions", 20000, open_by_instruction);
	int held = open(protected, O_RDONLY);
	measure("fopen and fclose, protected", 5000, protected_stream);
	close(held);
	measure("posix_spawn of /bin/true and its end", 100, start);
	return 0;
}
