/*
 * System calls by instructions of the program's own that nothing can replace. Prints their results.
 *
 * Usage: instructions PATH ORDINARY
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The number comes in a register and no error test follows. */
__attribute__((noinline)) static long call(long number, long a, long b, long c, long d)
{
	long result;
	register long fourth asm("r10") = d;
	register long sixth asm("r9") = 0;
	asm volatile("nop\n\tsyscall\n\tnop"
		     : "=a"(result)
		     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(fourth), "r"(sixth)
		     : "rcx", "r11", "memory");
	return result;
}

int main(int count, char **arguments)
{
	if (count != 3)
		return 2;
	char data[16] = "0123456789";
	long path = (long)arguments[1], ordinary = (long)arguments[2], bytes = (long)data;
	printf("openat: %ld\n", call(SYS_openat, AT_FDCWD, path, O_RDWR | O_CREAT, 0600));
	printf("creat: %ld\n", call(SYS_creat, path, 0600, 0, 0));
	printf("rename onto it: %ld\n", call(SYS_rename, ordinary, path, 0, 0));
	printf("mkdir: %ld\n", call(SYS_mkdir, path, 0700, 0, 0));
	printf("io_uring_setup: %ld\n", call(SYS_io_uring_setup, 8, bytes, 0, 0));
	long file = call(SYS_openat, AT_FDCWD, ordinary, O_RDWR | O_CREAT, 0600);
	printf("an ordinary file: %d %ld %ld\n", file >= 0, call(SYS_write, file, bytes, 5, 0),
	       call(SYS_fsync, file, 0, 0, 0));
	int fd = open(arguments[1], O_RDWR | O_CREAT, 0600);
	printf("open: %d\n", fd >= 0);
	printf("write, read: %ld %ld\n", call(SYS_write, fd, bytes, 5, 0), call(SYS_pread64, fd, bytes, 5, 0));
	printf("fsync, fdatasync, fchmod: %ld %ld %ld\n", call(SYS_fsync, fd, 0, 0, 0), call(SYS_fdatasync, fd, 0, 0, 0),
	       call(SYS_fchmod, fd, 0600, 0, 0));
	puts("done");
	return 0;
}
