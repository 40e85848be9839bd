/*
 * Names, attributes and listings in one directory. Prints a line for every observation; the same
 * program must print the same lines in an ordinary directory on ext4 and in a protected one.
 *
 * Usage: directory DIR. DIR exists and is empty; it is left empty.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "observe.h"

static const char *root;

/* A descriptor's number is no observation. */
#define OPEN(call) (errno = 0, opened(#call, (call)))

static int opened(const char *what, int fd)
{
	see(what, fd < 0 ? -1 : 0);
	if (fd >= 0)
		close(fd);
	return fd;
}

static const char *at(const char *name)
{
	static char room[4][4096];
	static int turn;
	char *path = room[turn++ % 4];
	snprintf(path, sizeof room[0], "%s/%s", root, name);
	return path;
}

static void show(const char *name)
{
	struct stat st;
	if (lstat(at(name), &st) < 0) {
		see(name, -1);
		return;
	}
	printf("%s: mode %o links %lu size %lld owner %d %d\n", name, st.st_mode,
	       (unsigned long)st.st_nlink, S_ISDIR(st.st_mode) ? 0 : (long long)st.st_size,
	       st.st_uid, st.st_gid);
}

static int by_name(const struct dirent **a, const struct dirent **b)
{
	return strcmp((*a)->d_name, (*b)->d_name);
}

static void list(const char *name)
{
	struct dirent *all[64], *entry;
	int n = 0;
	DIR *dir = opendir(at(name));
	if (!dir) {
		see(name, -1);
		return;
	}
	while ((entry = readdir(dir)) && n < 64) {
		all[n] = malloc(sizeof **all);
		memcpy(all[n++], entry, offsetof(struct dirent, d_name) + strlen(entry->d_name) + 1);
	}
	closedir(dir);
	qsort(all, n, sizeof *all, (int (*)(const void *, const void *))by_name);
	printf("entries of %s:", name);
	for (int i = 0; i < n; i++) {
		printf(" %s(%d)", all[i]->d_name, all[i]->d_type);
		free(all[i]);
	}
	printf("\n");
}

static void make(const char *name, const char *content)
{
	int fd = open(at(name), O_WRONLY | O_CREAT | O_TRUNC, 0644);
	if (fd < 0 || write(fd, content, strlen(content)) != (ssize_t)strlen(content))
		see(name, -1);
	close(fd);
}

static void opening(void)
{
	umask(027);
	OPEN(open(at("new"), O_RDWR));
	OPEN(open(at("new"), O_RDWR | O_CREAT, 0666));
	show("new");
	OPEN(open(at("new"), O_RDWR | O_CREAT | O_EXCL, 0666));
	OPEN(open(at("new"), O_RDONLY | O_DIRECTORY));
	OPEN(open(at("new/"), O_RDONLY));
	OPEN(open(at("new/x"), O_RDONLY | O_CREAT, 0600));
	OPEN(open(at("none/x"), O_RDONLY | O_CREAT, 0600));
	OPEN(open(at("slash/"), O_RDWR | O_CREAT, 0600));
	OPEN(open(root, O_RDWR));
	OPEN(open(root, O_RDONLY | O_CREAT, 0600));
	OPEN(open(root, O_RDONLY));
	OPEN(open(root, O_RDONLY | O_DIRECTORY));
	OPEN(open(root, O_PATH));
	OPEN(open(root, O_RDONLY | O_DIRECT));
	OPEN(open(at("x"), O_RDONLY | O_CREAT | O_DIRECTORY, 0600));
	OPEN(open(root, O_TMPFILE | O_RDONLY, 0600));
	OPEN(open(root, O_TMPFILE | O_RDWR, 0600));
	OPEN(open(at("new"), O_TMPFILE | O_RDWR, 0600));
	char name[300];
	memset(name, 'n', sizeof name);
	name[256] = 0;
	OPEN(open(at(name), O_RDWR | O_CREAT, 0600));
	name[255] = 0;
	OPEN(open(at(name), O_RDWR | O_CREAT, 0600));
	SEE(unlink(at(name)));
	OPEN(creat(at("new"), 0600));
	umask(022);
	int fd = open(root, O_RDONLY);
	char byte;
	SEE(read(fd, &byte, 1));
	SEE(pread(fd, &byte, 1, 0));
	SEE(write(fd, &byte, 1));
	SEE(ftruncate(fd, 0));
	SEE(fsync(fd));
	OPEN(openat(fd, "new", O_RDONLY));
	OPEN(openat(fd, "none", O_RDONLY));
	struct stat st;
	SEE(fstat(fd, &st));
	SEE(fstatat(fd, "new", &st, 0));
	SEE(fstatat(fd, "", &st, AT_EMPTY_PATH));
	see("is a directory", S_ISDIR(st.st_mode));
	SEE(fstatat(fd, "new/", &st, 0));
	close(fd);
	SEE(unlink(at("new")));
}

static void unnamed(void)
{
	int fd = open(root, O_TMPFILE | O_RDWR, 0600);
	char room[8] = "";
	struct stat st;
	SEE(write(fd, "abc", 3));
	SEE(pread(fd, room, 8, 0));
	SEE(fstat(fd, &st));
	see("links", st.st_nlink);
	close(fd);
	make("file", "unlinked");
	fd = open(at("file"), O_RDWR);
	SEE(unlink(at("file")));
	SEE(pread(fd, room, 8, 0));
	see("still there", memcmp(room, "unlinked", 8));
	SEE(fstat(fd, &st));
	see("links", st.st_nlink);
	make("file", "other");
	SEE(pread(fd, room, 8, 0));
	see("not the other", memcmp(room, "unlinked", 8));
	close(fd);
	show("file");
	SEE(unlink(at("file")));
	list("");
}

static void naming(void)
{
	SEE(mkdir(at("d"), 0755));
	SEE(mkdir(at("d"), 0755));
	SEE(mkdir(root, 0755));
	SEE(mkdir(at("d/e/"), 01777));
	show("d");
	show("d/e");
	make("f", "1234");
	make("d/g", "12");
	SEE(mkdir(at("f/x"), 0755));
	SEE(rmdir(at("d")));
	SEE(rmdir(at("f")));
	SEE(rmdir(at("none")));
	SEE(unlink(at("d")));
	SEE(unlink(at("none")));
	SEE(unlink(at("f/")));
	SEE(rename(at("none"), at("x")));
	SEE(rename(at("f"), at("d")));
	SEE(rename(at("d"), at("f")));
	SEE(rename(at("d"), at("d/e/x")));
	SEE(rename(at("d/e"), at("d")));
	SEE(rename(at("d/g"), at("d/g")));
	SEE(renameat2(AT_FDCWD, at("f"), AT_FDCWD, at("d/g"), RENAME_NOREPLACE));
	SEE(renameat2(AT_FDCWD, at("f"), AT_FDCWD, at("d/g"), RENAME_EXCHANGE));
	show("f");
	show("d/g");
	SEE(renameat2(AT_FDCWD, at("f"), AT_FDCWD, at("none"), RENAME_EXCHANGE));
	SEE(renameat2(AT_FDCWD, at("f"), AT_FDCWD, at("x"), 64));
	SEE(renameat2(AT_FDCWD, at("f"), AT_FDCWD, at("d/h"), RENAME_NOREPLACE));
	SEE(rename(at("d/h"), at("d/g")));
	show("d/g");
	SEE(rename(at("d"), at("moved")));
	list("moved");
	list("");
	SEE(remove(at("moved/g")));
	SEE(remove(at("moved")));
	SEE(unlinkat(AT_FDCWD, at("moved/e"), AT_REMOVEDIR));
	SEE(syscall(SYS_rmdir, at("moved")));
	list("");
}

static void attributes(void)
{
	make("f", "12345678");
	SEE(chmod(at("f"), 04751));
	show("f");
	SEE(chown(at("f"), 12, 34));
	show("f");
	SEE(chmod(at("none"), 0600));
	struct timespec times[2] = {{1000, 1}, {2000, 2}};
	struct stat st;
	SEE(utimensat(AT_FDCWD, at("f"), times, 0));
	SEE(stat(at("f"), &st));
	printf("times %ld.%ld %ld.%ld\n", st.st_atim.tv_sec, st.st_atim.tv_nsec, st.st_mtim.tv_sec,
	       st.st_mtim.tv_nsec);
	times[0].tv_nsec = UTIME_OMIT;
	times[1].tv_nsec = 2000000000;
	SEE(utimensat(AT_FDCWD, at("f"), times, 0));
	int fd = open(at("f"), O_RDWR);
	SEE(fchmod(fd, 0600));
	SEE(fchown(fd, 0, 0));
	times[1].tv_sec = 3000, times[1].tv_nsec = 0;
	SEE(futimens(fd, times));
	SEE(fstat(fd, &st));
	printf("times %ld %ld\n", st.st_atim.tv_sec, st.st_mtim.tv_sec);
	SEE(write(fd, "x", 1));
	SEE(fstat(fd, &st));
	see("modified since", st.st_mtim.tv_sec > 3000);
	close(fd);
	show("f");
	SEE(access(at("f"), R_OK | W_OK));
	SEE(access(at("f"), X_OK));
	SEE(access(root, X_OK));
	SEE(access(at("none"), F_OK));
	SEE(faccessat(AT_FDCWD, at("f"), 64, 0));
	SEE(truncate(at("f"), 3));
	SEE(truncate(root, 3));
	SEE(truncate(at("f"), -1));
	show("f");
	struct statfs fs;
	SEE(statfs(at("f"), &fs));
	see("block", fs.f_bsize);
	char link[16];
	SEE(readlink(at("f"), link, sizeof link));
	SEE(readlink(at("none"), link, sizeof link));
	SEE(unlink(at("f")));
}

static void streams(void)
{
	char name[16];
	for (int i = 0; i < 40; i++) {
		snprintf(name, sizeof name, "e%02d", i);
		int fd = open(at(name), O_CREAT | O_WRONLY, 0600);
		close(fd);
	}
	list("");
	DIR *dir = opendir(root);
	int count = 0;
	while (readdir(dir))
		count++;
	see("entries", count);
	rewinddir(dir);
	readdir(dir);
	long place = telldir(dir);
	struct dirent *entry = readdir(dir);
	char first[256];
	strcpy(first, entry->d_name);
	readdir(dir);
	seekdir(dir, place);
	see("the same again", strcmp(first, readdir(dir)->d_name));
	see("descriptor", fcntl(dirfd(dir), F_GETFD));
	SEE(closedir(dir));
	int fd = open(root, O_RDONLY);
	dir = fdopendir(dup(fd));
	/* All are removed while they are read. */
	while ((entry = readdir(dir)))
		if (entry->d_name[0] == 'e' && unlinkat(fd, entry->d_name, 0) < 0)
			see(entry->d_name, -1);
	closedir(dir);
	close(fd);
	list("");
	errno = 0;
	see("opendir of nothing", opendir(at("none")) ? 0 : -1);
}

static void working(void)
{
	char room[4096];
	struct stat st;
	SEE(mkdir(at("w"), 0755));
	make("w/f", "123");
	SEE(chdir(at("w/f")));
	SEE(chdir(at("none")));
	SEE(chdir(at("w")));
	see("working directory", strcmp(getcwd(room, sizeof room) + strlen(root), "/w"));
	SEE(stat("f", &st));
	see("size", st.st_size);
	OPEN(open("../w/./f", O_RDONLY));
	OPEN(open("g", O_CREAT | O_RDWR, 0600));
	SEE(rename("g", "h"));
	pid_t child = fork();
	if (child == 0)
		_exit(access("h", F_OK) ? 1 : 0);
	int status;
	waitpid(child, &status, 0);
	see("in a child", WEXITSTATUS(status));
	see("in another program", WEXITSTATUS(system("test -f h && test ! -f g")));
	SEE(chdir(".."));
	see("working directory", strcmp(getcwd(room, sizeof room), root));
	SEE(access("w/h", F_OK));
	int fd = open("w", O_RDONLY);
	SEE(fchdir(fd));
	close(fd);
	SEE(access("h", F_OK));
	SEE(chdir("/"));
	SEE(access("h", F_OK));
	see("working directory", strcmp(getcwd(room, sizeof room), "/"));
	SEE(unlink(at("w/h")));
	SEE(unlink(at("w/f")));
	SEE(rmdir(at("w")));
	list("");
}

int main(int argc, char **argv)
{
	if (argc != 2)
		return 2;
	root = argv[1];
	setvbuf(stdout, NULL, _IOLBF, 0);
	umask(022);
	opening();
	unnamed();
	naming();
	attributes();
	streams();
	working();
	printf("done\n");
	return 0;
}
