/*
 * Relative paths that lead out of the working directory and of open directories, and openat2.
 * Prints a line for every observation; the same program must print the same lines in an ordinary
 * directory on ext4 and in a protected one.
 *
 * Usage: leaving DIRECTORY. DIRECTORY is empty; files are made and removed beside it.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "observe.h"

static const char *root;

static char *at(const char *name)
{
	static char room[8][4096];
	static int next;
	char *made = room[next++ % 8];
	snprintf(made, 4096, *name ? "%s/%s" : "%s%s", root, name);
	return made;
}

static void put(const char *path, const char *text)
{
	int fd = open(path, O_CREAT | O_TRUNC | O_WRONLY, 0644);
	see(path[0] == '/' ? "made" : path, write(fd, text, strlen(text)));
	close(fd);
}

static void get(const char *what, int fd)
{
	char text[100] = "";
	int error = errno;
	ssize_t got = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
	printf("%s: %s, %s\n", what, fd < 0 ? strerrorname_np(error) : "open", text);
	(void)got;
	if (fd >= 0)
		close(fd);
	errno = 0;
}

static void leaving(void)
{
	struct stat st;
	char room[100] = "";
	SEE(chdir(at("a/b")));
	put("../../../beside", "beside");
	get("open", open("../../../beside", O_RDONLY));
	get("there and back", open("../../../a/../beside", O_RDONLY));
	get("through what is not there", open("../../../none/x", O_RDONLY));
	SEE(stat("../../../beside", &st));
	SEE((int)st.st_size);
	SEE(access("../../../beside", R_OK));
	SEE(access("../../../none", R_OK));
	SEE(mkdir("../../../besides", 0755));
	SEE(mkdir("../../../besides", 0755));
	SEE(symlink("../beside", "../../../besides/link"));
	get("a link outside", open("../../../besides/link", O_RDONLY));
	get("a link's parent", open("../../../besides/link/../x", O_RDONLY));
	SEE(readlink("../../../besides/link", room, sizeof room));
	puts(room);
	SEE(link("../../../beside", "../../../besides/two"));
	SEE(rename("../../../besides/two", "../../../besides/three"));
	SEE(chmod("../../../besides/three", 0600));
	SEE(truncate("../../../besides/three", 3));
	FILE *stream = fopen("../../../beside", "r");
	see("fopen", stream && fgets(room, sizeof room, stream) ? 0 : -1);
	puts(room);
	if (stream)
		fclose(stream);
	DIR *directory = opendir("../../../besides");
	int entries = 0;
	while (directory && readdir(directory))
		entries++;
	see("entries", entries);
	if (directory)
		closedir(directory);
	see("syscall", (long)syscall(SYS_access, "../../../beside", R_OK));
	see("a file beside the directory", access("../../f", R_OK));
	see("a program by a way out", WEXITSTATUS(system("test -f ../../../beside && cat ../../../beside")));
	puts("");
	SEE(chdir("../../../besides"));
	SEE(access("three", R_OK));
	SEE(chdir(at("a")));
	SEE(unlink("../../besides/link"));
	SEE(unlink("../../besides/three"));
	SEE(rmdir("../../besides"));
	/* A child that shares our memory goes its own way. */
	pid_t child = vfork();
	if (child == 0) {
		_exit(chdir("/") || access("b", R_OK) == 0);
	}
	int status;
	waitpid(child, &status, 0);
	see("a vfork child elsewhere", WEXITSTATUS(status));
	see("its parent", access("b", R_OK));
	SEE(chdir("/"));
	child = vfork();
	if (child == 0)
		_exit(chdir(at("a")) || access("b", R_OK));
	waitpid(child, &status, 0);
	see("a vfork child inside", WEXITSTATUS(status));
	see("its parent", access("b", R_OK));
	int fd = open(at("a"), O_RDONLY | O_DIRECTORY);
	get("openat out of a directory", openat(fd, "../../beside", O_RDONLY));
	SEE(fstatat(fd, "../../beside", &st, 0));
	SEE(faccessat(fd, "../../none", R_OK, 0));
	SEE(fchdir(fd));
	get("after fchdir", open("../../beside", O_RDONLY));
	close(fd);
	SEE(chdir(".."));
	SEE(chdir(".."));
	get("from outside", open("beside", O_RDONLY));
}

static int two(int directory, const char *path, unsigned long flags, unsigned long mode,
	       unsigned long resolve, size_t size)
{
	struct { struct open_how how; unsigned long more[2]; } how = {{flags, mode, resolve}, {0, 0}};
	return (int)syscall(SYS_openat2, directory, path, &how, size);
}

#define TWO(directory, path, flags, mode, resolve) \
	get("openat2 " #path " " #flags " " #resolve, \
	    two(directory, path, flags, mode, resolve, sizeof(struct open_how)))

static void openat2s(void)
{
	int a = open(at("a"), O_PATH | O_DIRECTORY);
	int above = open(at(".."), O_RDONLY | O_DIRECTORY);
	char inside[4096], full[4096];
	snprintf(inside, sizeof inside, "%s/f", strrchr(root, '/') + 1);
	snprintf(full, sizeof full, "%s/a/g", root);
	TWO(a, "g", O_RDONLY, 0, 0);
	TWO(a, "../f", O_RDONLY, 0, 0);
	TWO(a, "../f", O_RDONLY, 0, RESOLVE_BENEATH);
	TWO(a, "b/../g", O_RDONLY, 0, RESOLVE_BENEATH);
	TWO(a, "b/../../f", O_RDONLY, 0, RESOLVE_BENEATH);
	TWO(a, "../f", O_RDONLY, 0, RESOLVE_IN_ROOT);
	TWO(a, "../g", O_RDONLY, 0, RESOLVE_IN_ROOT);
	TWO(a, "/g", O_RDONLY, 0, RESOLVE_IN_ROOT);
	TWO(a, "/g", O_RDONLY, 0, RESOLVE_BENEATH);
	TWO(a, "/", O_RDONLY | O_DIRECTORY, 0, RESOLVE_IN_ROOT);
	TWO(a, "../../beside", O_RDONLY, 0, 0);
	TWO(a, "../../beside", O_RDONLY, 0, RESOLVE_BENEATH);
	TWO(a, "../../beside", O_RDONLY, 0, RESOLVE_IN_ROOT);
	TWO(a, "g", O_RDONLY, 0, RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV);
	TWO(a, full, O_RDONLY, 0, 0);
	TWO(a, full, O_RDONLY, 0, RESOLVE_BENEATH);
	TWO(AT_FDCWD, full, O_RDONLY, 0, RESOLVE_NO_SYMLINKS);
	TWO(above, inside, O_RDONLY, 0, 0);
	TWO(above, inside, O_RDONLY, 0, RESOLVE_BENEATH);
	TWO(above, inside, O_RDONLY, 0, RESOLVE_IN_ROOT);
	TWO(above, "none", O_RDONLY, 0, RESOLVE_BENEATH);
	TWO(a, "new", O_CREAT | O_EXCL | O_RDWR, 0640, RESOLVE_BENEATH);
	TWO(a, "new", O_CREAT | O_EXCL | O_RDWR, 0640, 0);
	TWO(a, "new", O_RDWR, 0640, 0);
	TWO(a, "new", O_CREAT | O_RDWR, 010640, 0);
	TWO(a, "new", O_RDONLY, 0, 0x40);
	TWO(a, "new", O_RDONLY, 0, RESOLVE_BENEATH | RESOLVE_IN_ROOT);
	TWO(a, "new", 0x08000000, 0, 0);
	TWO(a, "new", 1ul << 40, 0, 0);
	TWO(a, "new", O_PATH | O_RDWR, 0, 0);
	TWO(a, "new", O_PATH, 0, 0);
	TWO(a, "new", O_RDWR | O_TRUNC, 0, RESOLVE_CACHED);
	TWO(a, "b", O_RDWR | O_TMPFILE, 0600, 0);
	TWO(a, "b", O_RDONLY | O_TMPFILE, 0600, 0);
	TWO(a, "none", O_RDONLY, 0, 0);
	TWO(a, "new/", O_RDONLY, 0, RESOLVE_BENEATH);
	see("short", two(a, "g", 0, 0, 0, 16));
	see("with zeros behind", two(a, "g", 0, 0, 0, 40) < 0 ? -1 : 0);
	see("long", two(a, "g", 0, 0, 0, 5000));
	see("no how", syscall(SYS_openat2, a, "g", 8, 24));
	struct stat st;
	SEE(stat(at("a/new"), &st));
	SEE(st.st_mode);
	close(a), close(above);
}

int main(int argc, char **argv)
{
	root = argv[1];
	setvbuf(stdout, NULL, _IOLBF, 0);
	umask(022);
	SEE(mkdir(at("a"), 0755));
	SEE(mkdir(at("a/b"), 0755));
	put(at("f"), "the file");
	put(at("a/g"), "another");
	leaving();
	openat2s();
	SEE(unlink(at("../beside")));
	puts("done");
	return 0;
}
