/*
 * What the C library does inside itself: streams, temporary files, directories, children. Prints a
 * line for every observation; the same program must print the same lines on an ordinary file on
 * ext4 and on a protected file.
 *
 * Usage: streams PATH DIRECTORY (absolute; the directory is an ordinary one).
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "observe.h"

static void lines(const char *path)
{
	char *line = NULL;
	size_t room = 0;
	FILE *f = fopen(path, "r");
	while (getline(&line, &room, f) > 0)
		printf("| %s", line);
	see("end", feof(f));
	see("fclose", fclose(f));
	free(line);
}

static void text(const char *path)
{
	FILE *f = fopen(path, "w+");
	see("fopen", f != NULL);
	see("descriptor", fileno(f));
	see("fprintf", fprintf(f, "%d lines\nsecond\nthird line\n", 3));
	see("ftell", ftell(f));
	see("fseek", fseek(f, 2, SEEK_SET));
	see("fgetc", fgetc(f));
	see("ungetc", ungetc('L', f));
	char word[32];
	see("fscanf", fscanf(f, "%31s", word));
	printf("%s\n", word);
	see("fseek end", fseek(f, -5, SEEK_END));
	see("fread", fread(word, 1, sizeof word, f));
	see("feof", feof(f));
	rewind(f);
	see("fwrite", fwrite("FOUR", 1, 4, f));
	see("fflush", fflush(f));
	struct stat st;
	see("fstat", fstat(fileno(f), &st));
	see("size", st.st_size);
	see("ftruncate", ftruncate(fileno(f), 20));
	see("fsync", fsync(fileno(f)));
	see("fclose", fclose(f));
	lines(path);
	f = fopen(path, "a");
	see("append", fputs("appended\n", f));
	see("position", ftell(f));
	see("fclose", fclose(f));
	f = fopen(path, "wx");
	see("exclusive", f == NULL ? -1 : 0);
	f = fopen(path, "re");
	see("close-on-exec", fcntl(fileno(f), F_GETFD));
	see("write to a reader", fputc('x', f));
	fclose(f);
	f = fopen("/nonexistent/file", "r");
	see("nothing there", f == NULL ? -1 : 0);
	lines(path);
}

static void big(const char *path)
{
	char part[1000];
	FILE *f = fopen(path, "w");
	setvbuf(f, NULL, _IOFBF, 300);
	for (int i = 0; i < 500; i++) {
		memset(part, 'a' + i % 26, sizeof part);
		fwrite(part, 1, sizeof part, f);
	}
	see("fclose", fclose(f));
	f = freopen(path, "r", fopen("/dev/null", "r"));
	setvbuf(f, NULL, _IONBF, 0);
	long wrong = 0, all = 0;
	for (int i = 0; i < 500; i++) {
		all += fread(part, 1, sizeof part, f);
		for (int k = 0; k < 1000; k++)
			wrong += part[k] != 'a' + i % 26;
	}
	see("bytes", all);
	see("wrong", wrong);
	see("fseeko", fseeko(f, 26500, SEEK_SET));
	see("its byte", fgetc(f));
	FILE *other = fdopen(dup(fileno(f)), "r");
	see("by a duplicate", fgetc(other));
	fclose(other);
	fclose(f);
}

static void elsewhere(const char *directory)
{
	char name[4096];
	FILE *f = tmpfile();
	see("tmpfile", fputs("temporary", f));
	rewind(f);
	see("its byte", fgetc(f));
	fclose(f);
	snprintf(name, sizeof name, "%s/XXXXXX", directory);
	int fd = mkstemp(name);
	see("mkstemp", write(fd, "x", 1));
	close(fd);
	see("unlink", remove(name));
	snprintf(name, sizeof name, "%s/dXXXXXX", directory);
	see("mkdtemp", mkdtemp(name) != NULL);
	DIR *d = opendir(name);
	int entries = 0;
	while (readdir(d))
		entries++;
	see("entries", entries);
	closedir(d);
	see("rmdir", remove(name));
	char *real = realpath("/proc/self/../self/status", NULL);
	see("realpath", real != NULL);
	free(real);
	f = popen("echo from a child", "r");
	see("popen", fgets(name, sizeof name, f) != NULL);
	printf("%s", name);
	see("pclose", pclose(f));
	see("system", WEXITSTATUS(system("exit 4")));
}

static ssize_t look(void *cookie, const char *data, size_t length)
{
	char word[8] = "";
	(void)data;
	long got = pread(*(int *)cookie, word, 4, 0);
	dprintf(1, "at the very end: %ld %s\n", got, word);
	return length;
}

/* Streams that are open at exit are written out, the last thing but one that a process does. */
static void left_open(const char *path)
{
	fflush(stdout);
	pid_t child = fork();
	if (child == 0) {
		static int fd;
		fd = open(path, O_RDONLY);
		FILE *f = fopen(path, "w"), *last;
		fputs("left open\n", f), fflush(f);
		fputs("and not written\n", f);
		last = fopencookie(&fd, "w", (cookie_io_functions_t){.write = look});
		fputs("x", last);
		exit(0);
	}
	see("waitpid", waitpid(child, NULL, 0) == child);
	lines(path);
}

int main(int count, char **arguments)
{
	if (count != 3)
		return 2;
	setvbuf(stdout, NULL, _IOLBF, 0);
	text(arguments[1]);
	big(arguments[1]);
	left_open(arguments[1]);
	elsewhere(arguments[2]);
	puts("done");
	return 0;
}
