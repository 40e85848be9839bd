/*
 * escape DIR: tries to change something on the host in every way there is, by way of libc and by
 * system call instructions of its own, and prints each way and the errno that it got. DIR has the
 * file "there", its link "other" to be replaced, and the directory "empty".
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/xattr.h>
#include <unistd.h>
#include <utime.h>

#include "raw.h"

static void tell(const char *way, long answer, int error)
{
	printf("%s %d\n", way, answer < 0 ? error : 0);
}

#define LIBC(call)                         \
	do {                               \
		long answer = (call);      \
		tell(#call, answer, errno); \
	} while (0)
#define RAW(number, a, b, c, d)                                                   \
	do {                                                                      \
		long answer = raw(number, (long)(a), (long)(b), (long)(c), (long)(d)); \
		tell("raw " #number, answer, (int)-answer);                       \
	} while (0)

int main(int argc, char **argv)
{
	struct timespec times[2] = {{1, 0}, {1, 0}};
	char byte, self[64];
	int there;

	if (argc != 2 || chdir(argv[1]))
		return 2;
	there = open("there", O_RDONLY);
	if (there < 0 || read(there, &byte, 1) != 1)
		return 3;
	snprintf(self, sizeof self, "/proc/self/fd/%d", there);
	LIBC(open("new", O_CREAT | O_WRONLY, 0600));
	LIBC(open("there", O_WRONLY));
	LIBC(open("there", O_RDWR));
	LIBC(open("there", O_RDONLY | O_TRUNC));
	LIBC(open(".", O_TMPFILE | O_RDWR, 0600));
	LIBC(creat("new", 0600));
	LIBC(truncate("there", 0));
	LIBC(rename("there", "new"));
	LIBC(unlink("there"));
	LIBC(link("there", "new"));
	LIBC(symlink("there", "new"));
	LIBC(mkdir("new", 0700));
	LIBC(rmdir("empty"));
	LIBC(mkfifo("new", 0600));
	LIBC(chmod("there", 0777));
	LIBC(fchmod(there, 0777));
	LIBC(fchmodat(AT_FDCWD, "there", 0777, 0));
	LIBC(chown("there", 1, 1));
	LIBC(lchown("there", 1, 1));
	LIBC(fchown(there, 1, 1));
	LIBC(utimensat(AT_FDCWD, "there", times, 0));
	LIBC(futimens(there, times));
	LIBC(utime("there", NULL));
	LIBC(utimes("there", NULL));
	LIBC(setxattr("there", "user.x", "y", 1, 0));
	LIBC(fsetxattr(there, "user.x", "y", 1, 0));
	LIBC(lsetxattr("there", "user.x", "y", 1, 0));
	LIBC(removexattr("there", "user.was"));
	LIBC(open(self, O_WRONLY));
	RAW(SYS_open, "new", O_CREAT | O_WRONLY, 0600, 0);
	RAW(SYS_openat, AT_FDCWD, "there", O_RDWR, 0);
	RAW(SYS_creat, "new", 0600, 0, 0);
	RAW(SYS_truncate, "there", 0, 0, 0);
	RAW(SYS_rename, "there", "new", 0, 0);
	RAW(SYS_renameat, AT_FDCWD, "there", AT_FDCWD, "other");
	RAW(SYS_unlink, "there", 0, 0, 0);
	RAW(SYS_link, "there", "new", 0, 0);
	RAW(SYS_symlink, "there", "new", 0, 0);
	RAW(SYS_mkdir, "new", 0700, 0, 0);
	RAW(SYS_mknod, "new", S_IFREG | 0600, 0, 0);
	RAW(SYS_chmod, "there", 0777, 0, 0);
	RAW(SYS_fchmodat, AT_FDCWD, "there", 0777, 0);
	RAW(452 /* fchmodat2 */, AT_FDCWD, "there", 0777, 0);
	RAW(SYS_fchown, there, 1, 1, 0);
	RAW(SYS_utimensat, there, NULL, times, 0);
	RAW(SYS_setxattr, "there", "user.x", "y", 1);
	return 0;
}
