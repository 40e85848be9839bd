/*
 * Makes and renames files in a directory and writes down each one that was synced: the even ones
 * with what is in them by an fsync of the file, the odd ones, empty, by one of the directory. A
 * later run checks that all of them are there and nothing else is.
 *
 * Usage: names write|check DIR LOG
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static void fail(const char *what, const char *name)
{
	fprintf(stderr, "%s %s: %s\n", what, name, strerror(errno));
	exit(1);
}

/* Finished files so far: one line of eight bytes each. */
static long finished(int log)
{
	struct stat st;
	if (fstat(log, &st) < 0)
		fail("fstat", "log");
	return st.st_size / 8;
}

static void write_on(const char *dir, int log)
{
	char from[512], to[512], line[16];
	int names = open(dir, O_RDONLY | O_DIRECTORY);
	if (names < 0)
		fail("open", dir);
	/* The one that a kill interrupted may or may not be there. */
	for (long i = finished(log);; i++) {
		snprintf(from, sizeof from, "%s/n%ld", dir, i);
		snprintf(to, sizeof to, "%s/r%ld", dir, i);
		int fd = open(from, O_CREAT | O_WRONLY, 0600);
		if (fd < 0)
			fail("open", from);
		snprintf(line, sizeof line, "%07ld\n", i);
		if (i % 2 == 0 && write(fd, line, 8) != 8)
			fail("write", from);
		if (rename(from, to) < 0)
			fail("rename", from);
		if (fsync(i % 2 == 0 ? fd : names) < 0)
			fail("fsync", to);
		if (close(fd) < 0)
			fail("close", to);
		if (write(log, line, 8) != 8)
			fail("write", "log");
	}
}

static void check(const char *dir, int log)
{
	long all = finished(log), found = 0;
	DIR *stream = opendir(dir);
	struct dirent *entry;
	if (!stream)
		fail("opendir", dir);
	while ((entry = readdir(stream))) {
		if (entry->d_name[0] == '.')
			continue;
		long number = atol(entry->d_name + 1);
		if (entry->d_name[0] == 'r' && number < all)
			found++;
		else if (number != all)
			fail("never made", entry->d_name);
		char path[512];
		struct stat st;
		snprintf(path, sizeof path, "%s/%s", dir, entry->d_name);
		if (stat(path, &st) < 0)
			fail("stat", path);
		char line[16] = "", expected[16] = "";
		int fd = open(path, O_RDONLY);
		if (fd < 0 || read(fd, line, sizeof line - 1) < 0 || close(fd) < 0)
			fail("read", path);
		if (number % 2 == 0)
			snprintf(expected, sizeof expected, "%07ld\n", number);
		if (number < all && strcmp(line, expected) != 0)
			fail("content", path);
	}
	closedir(stream);
	if (found != all) {
		fprintf(stderr, "%ld of %ld finished files are there\n", found, all);
		exit(1);
	}
}

int main(int argc, char **argv)
{
	if (argc != 4)
		return 2;
	int log = open(argv[3], O_CREAT | O_RDWR | O_APPEND, 0600);
	if (log < 0)
		fail("open", argv[3]);
	if (strcmp(argv[1], "write") == 0)
		write_on(argv[2], log);
	else
		check(argv[2], log);
	return 0;
}
