/*
 * File calls on one path. Prints a line for every observation; the same program must print the
 * same lines on an ordinary file on ext4 and on a protected file.
 *
 * Usage: files PATH. The file exists; its content and size do not matter.
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
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>
#include <linux/fs.h>

#include "observe.h"

static const char *path;
static char *page;      /* 64 KiB, aligned */
static void *no_access; /* a page without access */

static unsigned checksum(const char *data, size_t length)
{
	unsigned sum = 17;
	for (size_t i = 0; i < length; i++)
		sum = sum * 31 + (unsigned char)data[i];
	return sum;
}

static void fill(char *data, size_t length, int seed)
{
	for (size_t i = 0; i < length; i++)
		data[i] = (char)(i * 7 + (size_t)seed + i / 251);
}

static void opening(void)
{
	int fd;
	SEE(open(path, O_RDWR | O_CREAT | O_EXCL, 0600));
	SEE(open(path, O_RDONLY | O_DIRECTORY));
	SEE(open((char *)8, O_RDONLY));
	char slash[4096];
	snprintf(slash, sizeof slash, "%s/", path);
	SEE(open(slash, O_RDONLY));
	fd = open(path, O_RDWR | O_TRUNC);
	see("size after O_TRUNC", lseek(fd, 0, SEEK_END));
	SEE(fcntl(fd, F_GETFL));
	SEE(fcntl(fd, F_GETFD));
	close(fd);
	fd = open(path, O_WRONLY | O_APPEND | O_CLOEXEC | O_SYNC | O_NOFOLLOW);
	SEE(fcntl(fd, F_GETFL));
	SEE(fcntl(fd, F_GETFD));
	SEE(read(fd, page, 10));
	SEE(pread(fd, page, 10, 0));
	SEE(fcntl(fd, F_SETFL, O_NONBLOCK | O_RDONLY | O_CREAT));
	SEE(fcntl(fd, F_GETFL));
	close(fd);
	SEE(close(fd));
	SEE(read(fd, page, 10));
	fd = open(path, O_RDONLY);
	SEE(write(fd, page, 10));
	SEE(ftruncate(fd, 10));
	SEE(fallocate(fd, 0, 0, 10));
	SEE(fsync(fd));
	close(fd);
	fd = open(path, O_PATH);
	SEE(read(fd, page, 10));
	SEE(lseek(fd, 0, SEEK_CUR));
	SEE(fsync(fd));
	SEE(fcntl(fd, F_GETFL));
	struct stat st;
	SEE(fstat(fd, &st));
	close(fd);
}

static void positions(void)
{
	int fd = open(path, O_RDWR | O_TRUNC);
	fill(page, 10000, 1);
	SEE(write(fd, page, 10000));
	SEE(lseek(fd, 0, SEEK_CUR));
	SEE(lseek(fd, -100, SEEK_END));
	memset(page, 0, 4096);
	SEE(read(fd, page, 4096));
	see("tail", checksum(page, 100));
	SEE(read(fd, page, 4096));
	SEE(lseek(fd, -1, SEEK_SET));
	SEE(lseek(fd, 0, 77));
	SEE(lseek(fd, -20000, SEEK_CUR));
	SEE(lseek(fd, 20000, SEEK_SET));
	SEE(read(fd, page, 10));
	SEE(lseek(fd, INT64_MAX, SEEK_SET));
	SEE(lseek(fd, 12288, SEEK_SET));
	SEE(write(fd, "end", 3));
	SEE(pread(fd, page, 16384, 0));
	see("with a gap", checksum(page, 12291));
	SEE(pwrite(fd, "xyz", 3, 5));
	SEE(lseek(fd, 0, SEEK_CUR));
	SEE(pread(fd, page, 10, -1));
	SEE(pwrite(fd, page, 10, -1));
	SEE(pread(fd, page, 10, INT64_MAX));
	SEE(pwrite(fd, page, 10, INT64_MAX - 5));
	SEE(pread(fd, page, 0, 0));
	SEE(write(fd, page, 0));
	SEE(pread(fd, page, 20, 12290));
	int twin = dup(fd);
	SEE(lseek(fd, 3, SEEK_SET));
	SEE(lseek(twin, 0, SEEK_CUR));
	SEE(read(twin, page, 4));
	SEE(lseek(fd, 0, SEEK_CUR));
	int other = open(path, O_RDONLY);
	SEE(lseek(other, 0, SEEK_CUR));
	int unread = 0;
	SEE(ioctl(fd, FIONREAD, &unread));
	see("unread", unread);
	close(other);
	close(twin);
	SEE(lseek(fd, 0, SEEK_CUR));
	SEE(lseek(fd, 20000, SEEK_DATA));
	SEE(lseek(fd, 12291, SEEK_HOLE));
	SEE(lseek(fd, 12290, SEEK_HOLE));
	SEE(lseek(fd, 12290, SEEK_DATA));
	SEE(lseek(fd, -1, SEEK_DATA));
	close(fd);
}

static void vectors(void)
{
	int fd = open(path, O_RDWR | O_TRUNC);
	char a[10], b[20], c[30];
	struct iovec parts[3] = {{a, sizeof a}, {b, sizeof b}, {c, sizeof c}};
	fill(a, 10, 2), fill(b, 20, 3), fill(c, 30, 4);
	SEE(writev(fd, parts, 3));
	SEE(pwritev(fd, parts, 2, 100));
	SEE(pwritev2(fd, parts, 1, -1, 0));
	SEE(lseek(fd, 0, SEEK_CUR));
	SEE(lseek(fd, 0, SEEK_SET));
	memset(a, 0, sizeof a), memset(b, 0, sizeof b), memset(c, 0, sizeof c);
	SEE(readv(fd, parts, 3));
	see("third part", checksum(c, sizeof c));
	SEE(preadv(fd, parts, 3, 95));
	see("second part", checksum(b, sizeof b));
	SEE(preadv2(fd, parts, 3, -1, 0));
	SEE(preadv(fd, parts, 3, -1));
	SEE(readv(fd, parts, -1));
	SEE(readv(fd, parts, 1025));
	SEE(readv(fd, (struct iovec *)8, 1));
	SEE(preadv2(fd, parts, 1, 0, 0x40000000));
	parts[1].iov_len = (size_t)-1;
	SEE(readv(fd, parts, 3));
	parts[1].iov_len = 20;
	parts[1].iov_base = no_access;
	SEE(preadv(fd, parts + 1, 1, 0));
	SEE(pwritev2(fd, parts, 1, 500, RWF_APPEND));
	see("size", lseek(fd, 0, SEEK_END));
	SEE(pwritev2(fd, parts, 1, 7, RWF_DSYNC));
	SEE(read(fd, (void *)-4096L, 10));
	SEE(pread(fd, no_access, 10, 0));
	SEE(pwrite(fd, no_access, 10, 0));
	SEE(pread(fd, NULL, 10, 0));
	SEE(pread(fd, page, (size_t)-1, 0));
	close(fd);
	fd = open(path, O_RDWR | O_APPEND);
	SEE(pwrite(fd, "appended", 8, 0));
	SEE(lseek(fd, 0, SEEK_CUR));
	SEE(write(fd, "more", 4));
	see("position after append is the end", lseek(fd, 0, SEEK_CUR) == lseek(fd, 0, SEEK_END));
	SEE(pwritev2(fd, parts, 1, 0, RWF_NOAPPEND));
	see("size", lseek(fd, 0, SEEK_END));
	close(fd);
}

static void direct(void)
{
	int fd = open(path, O_RDWR | O_TRUNC | O_DIRECT);
	fill(page, 16384, 5);
	SEE(write(fd, page, 16384));
	SEE(pwrite(fd, page, 100, 0));
	SEE(pwrite(fd, page + 1, 4096, 0));
	SEE(pwrite(fd, page, 512, 100));
	SEE(pread(fd, page, 100, 0));
	SEE(pread(fd, page + 8, 4096, 0));
	SEE(pread(fd, page, 512, 100));
	SEE(pread(fd, page, 512, 512));
	SEE(pread(fd, page, 100, 20001));
	SEE(fcntl(fd, F_SETFL, 0));
	SEE(pread(fd, page, 100, 1));
	see("read without O_DIRECT", checksum(page, 100));
	SEE(pwrite(fd, page, 77, 16384));
	SEE(fcntl(fd, F_SETFL, O_DIRECT));
	SEE(pread(fd, page, 4096, 16384));
	SEE(pread(fd, page, 4096, 16384 + 512));
	SEE(lseek(fd, 0, SEEK_SET));
	SEE(read(fd, page, 5));
	SEE(lseek(fd, 0, SEEK_CUR));
	close(fd);
}

static void sizes(void)
{
	int fd = open(path, O_RDWR | O_TRUNC);
	struct stat st;
	SEE(ftruncate(fd, 5000));
	SEE(fstat(fd, &st));
	see("st_size", st.st_size);
	see("regular", S_ISREG(st.st_mode));
	see("permissions", st.st_mode & 07777);
	see("st_nlink", (long)st.st_nlink);
	see("st_blksize", st.st_blksize);
	see("owner", st.st_uid == geteuid());
	ino_t inode = st.st_ino;
	dev_t device = st.st_dev;
	SEE(stat(path, &st));
	see("same file", st.st_ino == inode && st.st_dev == device);
	SEE(lstat(path, &st));
	see("same file", st.st_ino == inode && st.st_dev == device);
	SEE(fstatat(AT_FDCWD, path, &st, 0));
	SEE(fstatat(fd, "", &st, AT_EMPTY_PATH));
	see("same file", st.st_ino == inode && st.st_dev == device);
	SEE(fstatat(fd, "x", &st, 0));
	SEE(stat(path, (struct stat *)8));
	struct statx sx;
	SEE(statx(AT_FDCWD, path, 0, STATX_BASIC_STATS, &sx));
	see("stx_size", (long)sx.stx_size);
	see("same file", sx.stx_ino == inode);
	SEE(statx(fd, "", AT_EMPTY_PATH, STATX_SIZE, &sx));
	SEE(truncate(path, 4097));
	see("size", lseek(fd, 0, SEEK_END));
	SEE(truncate(path, -1));
	SEE(ftruncate(fd, -1));
	SEE(ftruncate(fd, INT64_MAX));
	fill(page, 8192, 6);
	SEE(pwrite(fd, page, 8192, 0));
	SEE(ftruncate(fd, 100));
	SEE(ftruncate(fd, 8192));
	SEE(pread(fd, page, 8192, 0));
	see("zeros behind a shortened end", checksum(page, 8192));
	SEE(fallocate(fd, 0, 8192, 4096));
	see("size", lseek(fd, 0, SEEK_END));
	SEE(fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, 40960));
	see("size", lseek(fd, 0, SEEK_END));
	SEE(fallocate(fd, FALLOC_FL_PUNCH_HOLE, 0, 4096));
	SEE(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 50, 20));
	SEE(fallocate(fd, FALLOC_FL_ZERO_RANGE, 12000, 4000));
	see("size", lseek(fd, 0, SEEK_END));
	SEE(fallocate(fd, 0, -1, 10));
	SEE(fallocate(fd, 0, 0, 0));
	SEE(pread(fd, page, 16000, 0));
	see("after punching", checksum(page, 16000));
	SEE(posix_fallocate(fd, 0, 20000));
	SEE(posix_fallocate(fd, 0, -1));
	see("size", lseek(fd, 0, SEEK_END));
	SEE(fsync(fd));
	SEE(fdatasync(fd));
	SEE(syncfs(fd));
	SEE(sync_file_range(fd, 0, 4096, SYNC_FILE_RANGE_WRITE));
	SEE(sync_file_range(fd, 0, 4096, 0x100));
	SEE(sync_file_range(fd, -1, 4096, 0));
	SEE(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED));
	SEE(posix_fadvise(fd, 0, 0, 99));
	SEE(posix_fadvise(fd, 0, -1, 0));
	SEE(access(path, F_OK));
	SEE(access(path, R_OK | W_OK));
	SEE(access(path, X_OK));
	SEE(access(path, 0x100));
	int n = 0;
	SEE(ioctl(fd, BLKSSZGET, &n));
	SEE(ioctl(fd, BLKGETSIZE64, &n));
	SEE(ioctl(fd, FIGETBSZ, &n));
	see("block size", n);
	close(fd);
}

static void descriptors(void)
{
	int fd = open(path, O_RDWR);
	int saved = dup(1);
	int low = dup2(fd, 77);
	see("dup2", low);
	SEE(fcntl(77, F_GETFD));
	SEE(pwrite(77, "seventy-seven", 13, 0));
	SEE(dup2(77, 77));
	SEE(dup3(fd, 78, O_CLOEXEC));
	SEE(fcntl(78, F_GETFD));
	SEE(dup3(fd, fd, 0));
	SEE(fcntl(fd, F_DUPFD, 200));
	SEE(fcntl(fd, F_DUPFD_CLOEXEC, 200));
	SEE(fcntl(201, F_GETFD));
	SEE(dup2(saved, 77));
	SEE(pread(77, page, 5, 0) >= 0 ? 0 : -1);
	SEE(close(77));
	SEE(pread(78, page, 13, 0));
	page[13] = 0;
	printf("%s\n", page);
	SEE(close_range(200, 300, 0));
	SEE(pread(200, page, 5, 0));
	SEE(pread(78, page, 5, 0));
	fflush(stdout);
	pid_t child = fork();
	if (child == 0) {
		see("child: read", pread(78, page, 13, 0));
		see("child: seek", lseek(fd, 4321, SEEK_SET));
		see("child: close", close(78));
		see("child: closed", pread(78, page, 5, 0));
		fflush(stdout);
		exit(3);
	}
	int status = 0;
	waitpid(child, &status, 0);
	see("child's status", WEXITSTATUS(status));
	see("shared position", lseek(fd, 0, SEEK_CUR));
	SEE(pread(78, page, 13, 0));
	SEE(close(78));
	SEE(flock(fd, LOCK_EX));
	int other = open(path, O_RDWR);
	SEE(flock(other, LOCK_EX | LOCK_NB));
	SEE(flock(fd, LOCK_UN));
	SEE(flock(other, LOCK_EX | LOCK_NB));
	struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 10, .l_len = 5};
	SEE(fcntl(fd, F_OFD_SETLK, &lock));
	SEE(fcntl(other, F_OFD_SETLK, &lock));
	SEE(fcntl(other, F_OFD_GETLK, &lock));
	see("holder", lock.l_pid);
	see("start", lock.l_start);
	lock.l_type = F_UNLCK, lock.l_pid = 0;
	SEE(fcntl(fd, F_OFD_SETLK, &lock));
	lock.l_type = F_WRLCK;
	SEE(fcntl(fd, F_SETLK, &lock));
	SEE(lockf(fd, F_TEST, 0));
	close(other);
	close(fd);
	fd = open(path, O_RDONLY);
	lock.l_type = F_WRLCK, lock.l_pid = 0;
	SEE(fcntl(fd, F_SETLK, &lock));
	SEE(fcntl(fd, F_SETLK, (void *)8));
	close(fd);
	close(saved);
}

static void by_number(void)
{
	int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR, 0);
	see("openat", fd >= 0);
	SEE(syscall(SYS_pwrite64, fd, "by number", 9, 0));
	SEE(syscall(SYS_lseek, fd, 3, SEEK_SET));
	SEE(syscall(SYS_read, fd, page, 6));
	page[6] = 0;
	printf("%s\n", page);
	SEE(syscall(SYS_read, fd, no_access, 6));
	SEE(syscall(SYS_fsync, fd));
	SEE(syscall(SYS_close, fd));
	SEE(syscall(SYS_close, fd));
	SEE(syscall(SYS_read, fd, page, 6));
}

static void paths(void)
{
	char copy[4096], other[4096];
	snprintf(copy, sizeof copy, "%s", path);
	char *name = strrchr(copy, '/');
	*name++ = 0;
	struct stat st;
	SEE(chdir(copy));
	SEE(stat(name, &st));
	see("size through a relative path", st.st_size > 0);
	snprintf(other, sizeof other, "../%s/./%s", strrchr(copy, '/') + 1, name);
	SEE(stat(other, &st));
	int directory = open(copy, O_RDONLY | O_DIRECTORY);
	SEE(fstatat(directory, name, &st, 0));
	SEE(faccessat(directory, name, R_OK, 0));
	int fd = openat(directory, name, O_RDONLY);
	see("openat", fd >= 0);
	close(fd);
	close(directory);
	SEE(mkdir(path, 0700));
	SEE(symlink("x", path));
	SEE(rmdir(path));
	SEE(chdir(path));
	SEE(readlink(path, other, sizeof other));
	SEE(chmod(path, 0600));
	SEE(chown(path, (uid_t)-1, (gid_t)-1));
}

static volatile sig_atomic_t handled;
static void on_segv(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)context;
	handled++;
	mprotect((void *)((uintptr_t)info->si_addr & ~4095UL), 4096, PROT_READ | PROT_WRITE);
}

static void signals(void)
{
	int fd = open(path, O_RDWR);
	struct sigaction action = {.sa_sigaction = on_segv, .sa_flags = SA_SIGINFO}, old;
	sigaddset(&action.sa_mask, SIGUSR1);
	SEE(sigaction(SIGSEGV, &action, &old));
	see("was default", old.sa_handler == SIG_DFL);
	SEE(pread(fd, no_access, 100, 0));
	see("handled", handled);
	*(volatile char *)no_access = 1;
	see("handled", handled);
	SEE(pread(fd, no_access, 9, 0));
	mprotect(no_access, 4096, PROT_NONE);
	SEE(sigaction(SIGSEGV, NULL, &old));
	see("still ours", old.sa_sigaction == on_segv && (old.sa_flags & SA_SIGINFO));
	see("its mask", sigismember(&old.sa_mask, SIGUSR1));
	sigset_t all, seen;
	sigfillset(&all);
	SEE(sigprocmask(SIG_BLOCK, &all, &seen));
	see("was blocked", sigismember(&seen, SIGSEGV));
	SEE(pread(fd, no_access, 100, 0));
	SEE(sigprocmask(SIG_SETMASK, NULL, &seen));
	see("is blocked", sigismember(&seen, SIGSEGV) + sigismember(&seen, SIGUSR2));
	sigdelset(&all, SIGUSR2);
	sigset_t one;
	sigemptyset(&one), sigaddset(&one, SIGSEGV);
	SEE(sigprocmask(SIG_UNBLOCK, &one, NULL));
	SEE(sigprocmask(SIG_SETMASK, NULL, &seen));
	see("is blocked", sigismember(&seen, SIGSEGV));
	sigemptyset(&all);
	SEE(sigprocmask(SIG_SETMASK, &all, NULL));
	SEE(signal(SIGSEGV, SIG_DFL) == (sighandler_t)(void *)on_segv);
	SEE(signal(SIGSEGV, SIG_IGN) == SIG_DFL);
	SEE(pwrite(fd, no_access, 100, 0));
	fflush(stdout);
	pid_t child = fork();
	if (child == 0)
		*(volatile char *)no_access = 1, _exit(1);
	int status = 0;
	waitpid(child, &status, 0);
	see("killed by", WTERMSIG(status));
	close(fd);
}

int main(int count, char **arguments)
{
	if (count != 2)
		return 2;
	path = arguments[1];
	page = aligned_alloc(4096, 65536);
	no_access = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	memset(page, 0, 65536);
	opening();
	positions();
	vectors();
	direct();
	sizes();
	descriptors();
	by_number();
	paths();
	signals();
	errno = 4711;
	int fd = open(path, O_RDWR);
	pwrite(fd, "x", 1, 0), pread(fd, page, 1, 0), fsync(fd), close(fd);
	see("errno untouched by success", errno == 4711);
	printf("done\n");
	return 0;
}
